// Weight files, single and in shards, and files that lie.
#include "trace_capture/safetensors.hpp"

#include <catch2/catch.hpp>
#include <random>

#include "tests/trace_capture/model_folder.hpp"

namespace kvreplay::test {
namespace {

using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;
using nlohmann::json;

// A float32, a float16, a bfloat16, an empty and an int64 tensor.
RawTensors some_tensors() {
  const auto bytes = [](std::size_t n, int first) {
    std::string out(n, '\0');
    for (std::size_t i = 0; i < n; ++i) {
      out[i] = static_cast<char>(first + static_cast<int>(i));
    }
    return out;
  };
  return {{"a.f32", {"F32", {2, 3}, bytes(24, 1)}},
          {"b.f16", {"F16", {3}, bytes(6, 40)}},
          {"c.bf16", {"BF16", {1, 2, 2}, bytes(8, 60)}},
          {"d.empty", {"F32", {0, 5}, ""}},
          {"e.i64", {"I64", {}, bytes(8, 90)}}};
}

std::string text_of(const Tensor& tensor) {
  std::string out(static_cast<std::size_t>(tensor.size()) * size_of(tensor.type), '\0');
  std::memcpy(out.data(), tensor.data, out.size());
  return out;
}

std::string refusal(const ModelFolder& folder) {
  return error_of([&] { const Safetensors opened(folder.path()); });
}
std::string refusal(std::string_view file) {
  const ModelFolder folder;
  folder.write("model.safetensors", file);
  return refusal(folder);
}

void check_some_tensors(const Safetensors& file) {
  const RawTensors expected = some_tensors();
  CHECK(file.names() == std::vector<std::string>{"a.f32", "b.f16", "c.bf16", "d.empty", "e.i64"});
  CHECK(text_of(file.tensor("a.f32", {2, 3})) == expected.at("a.f32").data);
  CHECK(text_of(file.tensor("b.f16", {3})) == expected.at("b.f16").data);
  CHECK(text_of(file.tensor("c.bf16", {1, 2, 2})) == expected.at("c.bf16").data);
  CHECK(file.tensor("a.f32", {2, 3}).type == ElementType::f32);
  CHECK(file.tensor("b.f16", {3}).type == ElementType::f16);
  CHECK(file.tensor("c.bf16", {1, 2, 2}).type == ElementType::bf16);
  CHECK(file.tensor("d.empty", {0, 5}).size() == 0);
  CHECK(file.has("e.i64"));
  CHECK_FALSE(file.has("__metadata__"));
  for (const Tensor& tensor : {file.tensor("a.f32", {2, 3}), file.tensor("c.bf16", {1, 2, 2})}) {
    CHECK(reinterpret_cast<std::uintptr_t>(tensor.data) % size_of(tensor.type) == 0);
  }
}

TEST_CASE("tensors come out as they went in, aligned to their element or not") {
  for (const bool unaligned : {false, true}) {
    const ModelFolder folder;
    folder.write("model.safetensors", safetensors(some_tensors(), unaligned));
    check_some_tensors(Safetensors(folder.path()));
  }
}

TEST_CASE("shards are one model, whose fingerprint is that of the single file") {
  const RawTensors all = some_tensors();
  const ModelFolder single, sharded;
  single.write("model.safetensors", safetensors(all));
  RawTensors first = all, second = all;
  first.erase("c.bf16");
  second.erase("a.f32");
  sharded.write("one.safetensors", safetensors(first));
  sharded.write("two.safetensors", safetensors(second));
  const json map = {{"a.f32", "one.safetensors"},
                    {"b.f16", "two.safetensors"},
                    {"c.bf16", "two.safetensors"},
                    {"d.empty", "one.safetensors"},
                    {"e.i64", "one.safetensors"}};
  sharded.write("model.safetensors.index.json", json{{"metadata", {{"total_size", 46}}}, {"weight_map", map}}.dump());

  const Safetensors whole(single.path()), parts(sharded.path());
  check_some_tensors(parts);
  CHECK_THAT(whole.fingerprint(), StartsWith("fingerprint-sha256:"));
  CHECK(whole.fingerprint().size() == std::string("fingerprint-sha256:").size() + 64);
  CHECK(whole.fingerprint() == parts.fingerprint());
}

TEST_CASE("the fingerprint sees names, types, shapes and both ends of the data") {
  const auto fingerprint = [](const RawTensors& tensors) {
    const ModelFolder folder;
    folder.write("model.safetensors", safetensors(tensors));
    return Safetensors(folder.path()).fingerprint();
  };
  const std::string data(20000, 'x');
  const RawTensors tensors = {{"a", {"F16", {100, 100}, data}}};
  const std::string original = fingerprint(tensors);
  CHECK(fingerprint(tensors) == original);
  CHECK(fingerprint({{"b", tensors.at("a")}}) != original);
  RawTensors changed = tensors;
  changed["a"].dtype = "BF16";
  CHECK(fingerprint(changed) != original);
  changed = tensors;
  changed["a"].shape = {50, 200};
  CHECK(fingerprint(changed) != original);
  for (const std::size_t at : {std::size_t{0}, std::size_t{4095}, data.size() - 4096, data.size() - 1}) {
    changed = tensors;
    changed["a"].data[at] = 'y';
    CHECK(fingerprint(changed) != original);
  }
}

TEST_CASE("a tensor that is asked for wrongly is refused, and only that one") {
  const ModelFolder folder;
  RawTensors tensors = some_tensors();
  tensors["f.f4"] = {"F4", {4}, "xx"};
  tensors["g.f8"] = {"F8_E4M3", {2}, "xx"};
  folder.write("model.safetensors", safetensors(tensors));
  const Safetensors file(folder.path());
  const auto refused = [&](const char* name, const std::vector<std::int64_t>& shape) {
    return error_of([&] { file.tensor(name, shape); });
  };
  CHECK(refused("b.f16", {3}).empty());
  CHECK_THAT(refused("a.f32", {3, 2}),
             Contains("model.safetensors: tensor a.f32: expected shape (3, 2), found (2, 3)"));
  CHECK_THAT(refused("a.f64", {2, 3}), Contains("tensor a.f64 is missing"));
  CHECK_THAT(refused("e.i64", {}), Contains("tensor e.i64: expected F32, F16 or BF16, found I64"));
  CHECK_THAT(refused("f.f4", {4}), Contains("expected F32, F16 or BF16, found F4"));
  CHECK_THAT(refused("g.f8", {2}), Contains("found F8_E4M3"));
}

TEST_CASE("a header that lies is refused with the number that cannot be") {
  const std::string good = safetensors(some_tensors());
  const auto lying = [&](const json& tensor) { return framed(json{{"t", tensor}}.dump(), "12345678"); };
  const auto entry = [](const json& dtype, const json& shape, const json& offsets) {
    return json{{"dtype", dtype}, {"shape", shape}, {"data_offsets", offsets}};
  };
  struct Lie {
    std::string file;
    const char* sentence;
  };
  constexpr std::int64_t kLarge = std::int64_t{1} << 40;
  const std::vector<Lie> all = {
      {"", "expected a safetensors file, found 0 bytes"},
      {good.substr(0, 7), "found 7 bytes"},
      {good.substr(0, 8), "bytes of header, found 0; the file was cut off"},
      {good.substr(0, 60), "bytes of header, found 52; the file was cut off"},
      {good.substr(0, good.size() - 1), "expected an end of at most 45 (bytes of data in the file), found 46"},
      {std::string(100, '\xff'), "a safetensors header of at most 100000000 bytes, found 18446744073709551615"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 17\n", "found a Git LFS pointer"},
      {framed("{\"t\": [1,", ""), "header: expected JSON, found none from byte 10 on"},
      {framed(std::string("{\"\xff\": 1}"), ""), "header: expected JSON"},
      {framed("[]", ""), "header: expected a JSON object, found []"},
      {framed("", ""), "header: expected JSON"},
      {framed(R"({"t": )" + std::string(100, '[') + std::string(100, ']') + "}", ""), "deeper than 64 levels"},
      {framed(R"({"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                  "t": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}})",
              "12"),
       "the name \"t\" is there twice"},
      {framed(R"({"t": {"dtype": "U8", "shape": [1], "shape": [2], "data_offsets": [0, 1]}})", "12"),
       "the name \"shape\" is there twice"},
      {lying(5), "tensor t: expected dtype, shape and data_offsets, found 5"},
      {lying({{"dtype", "F32"}, {"shape", {2}}}), "expected dtype, shape and data_offsets"},
      {lying(entry(7, {2}, {0, 8})), "dtype: expected a string, found 7"},
      {lying(entry("F32", "2", {0, 8})), "shape: expected a list of at most 16 numbers, found \"2\""},
      {lying(entry("F32", json(std::vector<int>(17, 1)), {0, 8})), "shape: expected a list of at most 16 numbers"},
      {lying(entry("F32", {-2}, {0, 8})), "shape: expected whole numbers of at least 0, found [-2]"},
      {lying(entry("F32", {2.0}, {0, 8})), "shape: expected whole numbers"},
      {lying(entry("F32", {18446744073709551615U}, {0, 8})), "shape: expected whole numbers"},
      {lying(entry("F32", {kLarge, kLarge}, {0, 8})), "has more elements than can be counted"},
      {lying(entry("F32", {kLarge, std::int64_t{1} << 22}, {0, 0})), "expected 4611686018427387904 elements"},
      {lying(entry("F32", {3}, {0, 8})), "tensor t: expected 3 elements of 4 bytes (F32 (3)), found 8 bytes"},
      {lying(entry("F32", {0}, {0, 8})), "expected 0 elements"},
      {lying(entry("F32", {2}, {0, 9})), "expected an end of at most 8 (bytes of data in the file), found 9"},
      {lying(entry("F32", {2}, {8, 16})), "expected an end of at most 8"},
      {lying(entry("F32", {2}, {8, 0})), "data_offsets: expected [begin, end], found [8,0]"},
      {lying(entry("F32", {2}, {-8, 0})), "data_offsets: expected [begin, end]"},
      {lying(entry("F32", {2}, {0})), "data_offsets: expected [begin, end]"},
      {lying(entry("F32", {2}, {0, 9223372036854775808U})), "data_offsets: expected [begin, end]"},
      {lying(entry("F32", {2}, nullptr)), "data_offsets: expected [begin, end], found null"},
      {framed(json{{"t", entry("U8", {5}, {0, 5})}, {"u", entry("U8", {4}, {4, 8})}}.dump(), "12345678"),
       "the data of tensors t and u overlap"},
  };
  for (const Lie& lie : all) {
    const std::string sentence = refusal(lie.file);
    CHECK_THAT(sentence, Contains(lie.sentence));
    CHECK_THAT(sentence, Contains("model.safetensors"));
    CHECK(sentence.find('\n') == std::string::npos);
  }
  // A hole between tensors, and an empty tensor anywhere, are no lies.
  CHECK(
      refusal(
          framed(json{{"t", entry("U8", {2}, {0, 2})}, {"u", entry("U8", {2}, {6, 8})}, {"v", entry("U8", {0}, {1, 1})}}
                     .dump(),
                 "12345678"))
          .empty());
}

TEST_CASE("an index that leads astray is refused") {
  const ModelFolder folder;
  const auto with_index = [&](const std::string& text) {
    folder.write("model.safetensors.index.json", text);
    return refusal(folder);
  };
  const auto mapping = [&](const json& shard) { return with_index(json{{"weight_map", {{"a.f32", shard}}}}.dump()); };
  folder.write("one.safetensors", safetensors(some_tensors()));
  CHECK(mapping("one.safetensors").empty());
  CHECK_THAT(mapping("two.safetensors"),
             Contains("index.json: tensor a.f32 is in two.safetensors, which is not in the folder"));
  for (const json& escape : {json("../one.safetensors"), json("/etc/passwd"), json(".."), json("."), json(""),
                             json("sub/one.safetensors"), json(std::string("one.safetensors\0", 16)), json(3)}) {
    CHECK_THAT(mapping(escape), Contains("expected the name of a file in the same folder, found " + escape.dump()));
  }
  CHECK_THAT(with_index(R"({"weight_map": {"z": "one.safetensors"}})"),
             Contains("tensor z is not in one.safetensors, where it should be"));
  CHECK_THAT(with_index(R"({"weight_map": {}})"), Contains("expected an object weight_map"));
  CHECK_THAT(with_index(R"({"weight_map": {"a.f32": "one.safetensors", "a.f32": "two.safetensors"}})"),
             Contains("the name \"a.f32\" is there twice"));
  CHECK_THAT(with_index("{}"), Contains("expected an object weight_map"));
  CHECK_THAT(with_index("no"), Contains("index.json: expected JSON"));
  folder.write("one.safetensors", "short");
  CHECK_THAT(mapping("one.safetensors"), Contains("one.safetensors: expected a safetensors file, found 5 bytes"));
}

TEST_CASE("a folder without safetensors says what to do") {
  const ModelFolder folder;
  CHECK_THAT(refusal(folder), Contains("expected model.safetensors or model.safetensors.index.json, found nothing"));
  folder.write("consolidated.safetensors", "");
  CHECK_THAT(refusal(folder), Contains("found consolidated.safetensors"));
  folder.write("pytorch_model-00001-of-00002.bin", "");
  CHECK_THAT(refusal(folder), Contains("found pytorch_model-00001-of-00002.bin; convert it with transformers: python"));
  std::filesystem::create_symlink("nowhere", folder / "model.safetensors");
  CHECK_THAT(refusal(folder), Contains("model.safetensors: cannot be opened: No such file or directory"));
  std::filesystem::remove(folder / "model.safetensors");
  std::filesystem::create_directory(folder / "model.safetensors");
  CHECK_THAT(refusal(folder), Contains("model.safetensors: expected a regular file"));
}

}  // namespace
}  // namespace kvreplay::test
