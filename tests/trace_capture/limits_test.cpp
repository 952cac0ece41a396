// Files of a model folder that ask for far more than their size: refused before it is allocated, or cut off in time.
#include <catch2/catch.hpp>

#include "tests/trace_capture/model_folder.hpp"
#include "trace_capture/config.hpp"
#include "trace_capture/safetensors.hpp"
#include "trace_capture/tokenizer.hpp"

namespace kvreplay::test {
namespace {

using nlohmann::json;

// "a" by byte-level BPE; `change` makes it hostile.
template <typename Change>
std::string refusal_of_tokenizer(std::string_view text, Change&& change) {
  json file = json::parse(R"({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
                              "post_processor": null, "decoder": null,
                              "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})");
  change(file);
  const TemporaryFolder folder;
  write_file(folder / "tokenizer.json", file.dump());
  return error_of([&] {
    const Tokenizer tokenizer(folder / "");
    tokenizer.decode(tokenizer.encode(text));
    tokenizer.piece(0);
  });
}

json repeated(const json& step, int n) { return json(static_cast<std::size_t>(n), step); }

}  // namespace

TEST_CASE("tensors that share unaligned data are refused, however many there are") {
  const std::string data(1000, '\1');
  json header;
  for (int i = 0; i < 100; ++i) {
    header["t" + std::to_string(i)] = {{"dtype", "F32"}, {"shape", {249}}, {"data_offsets", {1, 997}}};
  }
  const TemporaryFolder folder;
  write_file(folder / "model.safetensors", framed(header.dump(), data));
  CHECK_THAT(error_of([&] { Safetensors(folder / ""); }), Catch::Contains("overlap"));
}

TEST_CASE("a header that is nested, repeated or longer than its file is refused") {
  const TemporaryFolder folder;
  const auto refusal = [&](const std::string& file) {
    write_file(folder / "model.safetensors", file);
    return error_of([&] { Safetensors(folder / ""); });
  };
  CHECK_THAT(refusal(framed(std::string(100000, '['), "")), Catch::Contains("nested deeper than 64 levels"));
  CHECK_THAT(refusal(framed(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1})", "abcd")),
             Catch::Contains("the name \"a\" is there twice"));
  CHECK_THAT(refusal(std::string("\0\0\0\0\0\0\0\x7f", 8) + "{}"), Catch::Contains("header of at most"));
  CHECK_THAT(refusal(framed(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})", "abcd")),
             Catch::Contains("an end of at most 4"));
  CHECK_THAT(
      refusal(framed(R"({"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}})", "abcd")),
      Catch::Contains("more elements than can be counted"));
}

TEST_CASE("a config.json that is nested without end, or of absurd numbers, is refused") {
  const TemporaryFolder folder;
  const auto refusal = [&](const std::string& text) {
    write_file(folder / "config.json", text);
    return error_of([&] { read_config(folder / ""); });
  };
  CHECK_THAT(refusal("{\"a\": " + std::string(1000000, '[')), Catch::Contains("nested deeper than 64 levels"));
  CHECK_THAT(refusal(R"({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1e400})"),
             Catch::Contains("a number that is too large"));
  CHECK_THAT(refusal(R"({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 18446744073709551615})"),
             Catch::Contains("num_hidden_layers: expected an integer in [1, 1024]"));
}

TEST_CASE("steps that double a text each are cut off") {
  const json doubles = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  CHECK(refusal_of_tokenizer("abba", [&](json& file) {
          file["normalizer"] = {{"type", "Sequence"}, {"normalizers", repeated(doubles, 3)}};
        }) == "");
  CHECK_THAT(refusal_of_tokenizer("abba",
                                  [&](json& file) {
                                    file["normalizer"] = {{"type", "Sequence"}, {"normalizers", repeated(doubles, 60)}};
                                  }),
             Catch::Contains("the replacements of tokenizer.json make"));
  CHECK_THAT(refusal_of_tokenizer("abba",
                                  [&](json& file) {
                                    file["decoder"] = {{"type", "Sequence"}, {"decoders", repeated(doubles, 60)}};
                                  }),
             Catch::Contains("the replacements of tokenizer.json make"));
  CHECK_THAT(refusal_of_tokenizer("abba",
                                  [&](json& file) {
                                    file["pre_tokenizer"] = {
                                        {"type", "Sequence"},
                                        {"pretokenizers", repeated({{"type", "ByteLevel"}, {"use_regex", false}}, 40)}};
                                  }),
             Catch::Contains("ByteLevel is there twice"));
}

TEST_CASE("more steps than anyone needs are refused") {
  const json split = {{"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Isolated"}};
  CHECK_THAT(
      refusal_of_tokenizer("ab",
                           [&](json& file) {
                             file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", repeated(split, 100000)}};
                           }),
      Catch::Contains("more than 64 steps"));
  CHECK_THAT(refusal_of_tokenizer(
                 "ab",
                 [&](json& file) {
                   file["normalizer"] = {{"type", "Sequence"}, {"normalizers", repeated({{"type", "NFC"}}, 1000)}};
                 }),
             Catch::Contains("more than 64 steps"));
}

TEST_CASE("an expression that goes back and forth is cut off") {
  const std::string text(40, 'a');
  CHECK_THAT(refusal_of_tokenizer(text,
                                  [&](json& file) {
                                    file["pre_tokenizer"] = {{"type", "Split"},
                                                             {"pattern", {{"Regex", "(a|a)*[xy]"}}},
                                                             {"behavior", "Isolated"}};
                                  }),
             Catch::Contains("the text cannot be split into words"));
}

}  // namespace kvreplay::test
