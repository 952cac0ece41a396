// Prompt files and what is refused in them; the plan of what is stored, and its size.
#include "trace_capture/job.hpp"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <functional>

#include "policies/errors.hpp"
#include "trace_capture/plan.hpp"
#include "traces/writer.hpp"

namespace kvreplay {
namespace {

class File {
 public:
  explicit File(const std::string& text)
      : path_(std::filesystem::temp_directory_path() / ("kvreplay_job_" + std::to_string(::getpid()))) {
    std::ofstream(path_) << text;
  }
  ~File() { std::filesystem::remove(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::string sentence_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "nothing was refused";
}

ModelConfig small_config() {
  ModelConfig config;
  config.name = "small";
  config.json = "{}";
  config.n_layers = 6;
  config.hidden = 24;
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 8;
  config.vocab = 50;
  config.max_positions = 100;
  return config;
}

Prompt ids_prompt(std::vector<std::int32_t> ids) {
  Prompt prompt;
  prompt.where = "here";
  prompt.ids = std::move(ids);
  return prompt;
}

}  // namespace

TEST_CASE("a token file is a list, or an object with prompt and decode") {
  const Prompt list = read_tokens(File(" [3, 1, 4]\n").path());
  CHECK(list.ids == std::vector<std::int32_t>{3, 1, 4});
  CHECK_FALSE(list.text);
  CHECK_FALSE(list.decode);

  const Prompt object =
      read_tokens(File(R"({"prompt": [1, 2], "decode": [5], "spans": {"needle": [0, 2]}, "name": "x"})").path());
  CHECK(object.ids == std::vector<std::int32_t>{1, 2});
  CHECK(object.decode == std::vector<std::int32_t>{5});
  CHECK(object.spans == std::vector<Span>{{"needle", 0, 2}});
  CHECK(object.name == "x");
}

TEST_CASE("what is no token file is refused by line, key and value") {
  const auto [text, words] = GENERATE(table<std::string, std::string>({
      {"", ":1: the JSON ends too early"},
      {"[1,\n2,\nx]", ":3: no JSON at x]"},
      {"[1, 2", ":1: the JSON ends too early"},
      {"[1, -2]", "the list[1] must be a token id (a whole number from 0), found -2"},
      {"[1, 2.0]", "the list[1] must be a token id (a whole number from 0), found 2.0"},
      {"[1, \"a\"]", "found \"a\""},
      {"[1, 99999999999]", "found 99999999999"},
      {"[1, 18446744073709551615]", "found 18446744073709551615"},
      {"7", "a list of token ids or {\"prompt\": [ids], \"decode\": [ids]} is expected, found 7"},
      {"{}", "found {}"},
      {R"({"prompt": "text"})", "prompt must be a list of token ids, found \"text\""},
      {R"({"prompt": [1], "decod": [2]})", "decod is unknown; the nearest of prompt, decode, spans, name is 'decode'"},
      {R"({"prompt": [1], "spans": {"a": 3}})", "spans must be {\"NAME\": [begin, end]}"},
      {R"({"prompt": [1], "spans": {"a": [0, 1.5]}})", "span 'a' must begin and end at tokens"},
      {R"({"prompt": [1], "name": "../a"})", "name must be the name of a file"},
  }));
  const File file(text);
  CAPTURE(text);
  CHECK_THAT(sentence_of([&] { read_tokens(file.path()); }),
             Catch::Contains(words) && Catch::StartsWith(file.path().string()));
}

TEST_CASE("a prompts file has one object per line") {
  const File file(
      "{\"prompt\": \"Hello\"}\n"
      "\n"
      "{\"tokens\": [1, 2], \"decode\": [3], \"spans\": [{\"name\": \"n\", \"begin\": 0, \"end\": 1}]}\r\n"
      "{\"tokens\": [4], \"name\": \"last\"}");
  const std::vector<Prompt> prompts = read_prompts(file.path());
  REQUIRE(prompts.size() == 3);
  CHECK(prompts[0].text == std::string("Hello"));
  CHECK(prompts[0].name == "prompt-0001");
  CHECK(prompts[1].ids == std::vector<std::int32_t>{1, 2});
  CHECK(prompts[1].decode == std::vector<std::int32_t>{3});
  CHECK(prompts[1].spans == std::vector<Span>{{"n", 0, 1}});
  CHECK(prompts[1].name == "prompt-0003");
  CHECK(prompts[1].where == file.path().string() + ":3");
  CHECK(prompts[2].name == "last");
}

TEST_CASE("what is no prompts file is refused by line") {
  const auto [text, words] = GENERATE(table<std::string, std::string>({
      {"\n\n", "there is no prompt in it"},
      {"{\"tokens\": [1]}\n{\"tokens\": [1}\n", ":2: no JSON at }"},
      {"{\"tokens\": [1]}\n[1]\n", ":2: an object with either prompt (text) or tokens (ids) is expected, found [1]"},
      {"{\"tokens\": [1], \"prompt\": \"a\"}", ":1: an object with either"},
      {"{\"prompt\": [1]}", ":1: prompt must be text, found [1]; token ids are given as tokens"},
      {"{\"tokens\": [1], \"name\": \"a\"}\n{\"tokens\": [1], \"name\": \"a\"}",
       ":2: the trace 'a' would replace that of "},
      {"{\"tokens\": [1]}\n{\"tokens\": [1], \"name\": \"prompt-0001\"}", ":2: the trace 'prompt-0001' would replace"},
      {"{\"tokens\": [1], \"token\": [1]}", "token is unknown"},
  }));
  const File file(text);
  CAPTURE(text);
  CHECK_THAT(sentence_of([&] { read_prompts(file.path()); }), Catch::Contains(words));
}

TEST_CASE("spans are named ranges, in either form, each name once") {
  const std::vector<Span> expected = {{"a", 1, 3}, {"b", 2, 9}};
  CHECK(read_spans(File(R"({"a": [1, 3], "b": [2, 9]})").path()) == expected);
  CHECK(read_spans(File(R"([{"name": "a", "begin": 1, "end": 3}, {"name": "b", "begin": 2, "end": 9}])").path()) ==
        expected);
  const File twice(R"([{"name": "a", "begin": 1, "end": 3}, {"name": "a", "begin": 2, "end": 9}])");
  CHECK_THAT(sentence_of([&] { read_spans(twice.path()); }), Catch::Contains("span 'a' is there twice"));
  const File number("3");
  CHECK_THAT(sentence_of([&] { read_spans(number.path()); }), Catch::Contains("found 3"));
}

TEST_CASE("a sequence is checked against the model") {
  const ModelConfig config = small_config();
  SECTION("generated") {
    const Sequence s = sequence_of(ids_prompt({1, 49}), config, nullptr, {.max_new_tokens = 98});
    CHECK(s.prompt_len() == 2);
    CHECK(s.n_tokens() == 100);
    CHECK(s.decode.empty());
  }
  SECTION("given") {
    Prompt prompt = ids_prompt({1});
    prompt.decode = std::vector<std::int32_t>{2, 3, 4};
    CHECK(sequence_of(prompt, config, nullptr, {.teacher_forced = true}).decode == *prompt.decode);
    const Sequence cut = sequence_of(prompt, config, nullptr, {.max_new_tokens = 2, .teacher_forced = true});
    CHECK(cut.decode == std::vector<std::int32_t>{2, 3});
    CHECK(cut.n_tokens() == 3);
    CHECK_THAT(
        sentence_of([&] { sequence_of(prompt, config, nullptr, {.max_new_tokens = 4, .teacher_forced = true}); }),
        Catch::Contains("--max-new-tokens 4 is more than the 3 decode tokens"));
    CHECK_THAT(sentence_of([&] { sequence_of(prompt, config, nullptr, {.max_new_tokens = 2}); }),
               Catch::Contains("add --teacher-forced"));
    prompt.decode = std::vector<std::int32_t>{2, 50};
    CHECK_THAT(sentence_of([&] { sequence_of(prompt, config, nullptr, {.teacher_forced = true}); }),
               Catch::Contains("decode[1] is 50, but the model's vocabulary has the ids 0 to 49"));
  }
  SECTION("refused") {
    const auto refused = [&](Prompt prompt, SequenceLimits limits) {
      return sentence_of([&] { sequence_of(prompt, config, nullptr, limits); });
    };
    CHECK_THAT(refused(ids_prompt({}), {.max_new_tokens = 1}), Catch::Equals("here: the prompt is empty; it needs at "
                                                                             "least one token"));
    CHECK_THAT(refused(ids_prompt({1, 50}), {.max_new_tokens = 1}), Catch::Contains("the prompt[1] is 50"));
    CHECK_THAT(refused(ids_prompt(std::vector<std::int32_t>(101, 1)), {.max_new_tokens = 0}),
               Catch::Contains("the prompt has 101 tokens, but the context of small is 100"));
    CHECK_THAT(refused(ids_prompt({1, 2}), {.max_new_tokens = 99}),
               Catch::Contains("a prompt of 2 tokens and 99 new ones make 101, but the context of small is 100"));
    CHECK_THAT(refused(ids_prompt({1, 2}), {.max_new_tokens = 2147483647}), Catch::Contains("make 2147483649"));
    CHECK_THAT(refused(ids_prompt({1}), {}), Catch::Contains("--max-new-tokens is missing"));
    CHECK_THAT(refused(ids_prompt({1}), {.teacher_forced = true}), Catch::Contains("needs the tokens of the decode"));
    Prompt spanned = ids_prompt({1, 2});
    spanned.spans = {{"far", 1, 4}};
    CHECK_THAT(refused(spanned, {.max_new_tokens = 1}), Catch::Contains("span 'far' is [1, 4)"));
    CHECK(sequence_of(spanned, config, nullptr, {.max_new_tokens = 2}).spans == spanned.spans);
    spanned.spans = {{"none", 1, 1}};
    CHECK_THAT(refused(spanned, {.max_new_tokens = 2}), Catch::Contains("must begin before its end"));
  }
}

TEST_CASE("RoPE scaling that stretches the context counts") {
  ModelConfig config = small_config();
  CHECK(context_of(config) == 100);
  config.rope.factor = 4;
  config.rope.original_max_positions = 50;
  config.rope.type = "llama3";  // max_position_embeddings says it already
  CHECK(context_of(config) == 100);
  config.rope.type = "yarn";
  CHECK(context_of(config) == 200);
  config.rope.type = "dynamic";
  config.rope.original_max_positions = 0;
  CHECK(context_of(config) == 400);
}

TEST_CASE("--queries says which tokens have their query stored") {
  const auto tokens = [](const char* text) { return QueryChoice::parse(text).tokens(4, 7); };
  CHECK(tokens("all") == std::vector<Pos>{0, 1, 2, 3, 4, 5, 6});
  CHECK(tokens("decode") == std::vector<Pos>{4, 5, 6});
  CHECK(tokens("window:2") == std::vector<Pos>{2, 3, 4, 5, 6});
  CHECK(tokens("window:99") == tokens("all"));
  for (const char* bad : {"", "some", "window", "window:", "window:0", "window:-1", "window:2x", "All"}) {
    CHECK_THAT(sentence_of([&] { QueryChoice::parse(bad); }), Catch::Contains("--queries: '" + std::string(bad) + "'"));
  }
}

TEST_CASE("outputs are checked at the last step, at others between, and where there are queries") {
  const ModelConfig config = small_config();
  RecordPlan plan = record_plan(config, {}, 50, 100);
  CHECK(plan.layers == std::vector<int>{0, 1, 2, 3, 4, 5});
  REQUIRE(plan.outputs.size() == 20);
  CHECK(plan.outputs[0] == 11);  // the ends of four quarters of the prompt
  CHECK(plan.outputs[3] == 49);
  CHECK(plan.outputs[4] == 52);
  CHECK(plan.outputs.back() == 99);
  CHECK(record_plan(config, {.check_steps = 0}, 50, 100).outputs.empty());
  CHECK(record_plan(config, {.check_steps = 1}, 50, 100).outputs == std::vector<Pos>{49, 99});
  CHECK(record_plan(config, {.check_steps = 9}, 2, 4).outputs == std::vector<Pos>{0, 1, 2, 3});
  plan = record_plan(config, {.queries = QueryChoice::parse("decode"), .check_steps = 2}, 50, 100);
  CHECK(plan.outputs == std::vector<Pos>{74, 99});
  plan = record_plan(config, {.queries = QueryChoice::parse("window:1"), .check_steps = 2}, 50, 100);
  CHECK(plan.outputs == std::vector<Pos>{49, 74, 99});
  CHECK_THAT(sentence_of([&] {
               record_plan(config, {.layers = {2, 6}}, 1, 2);
             }),
             Catch::Contains("small has no layer 6; its layers are 0 to 5"));
}

TEST_CASE("the estimate is the size of the file to within its metadata") {
  Model model;
  model.config = small_config();
  model.layers.resize(6);
  for (LayerWeights& layer : model.layers) {
    layer.o.type = ElementType::bf16;
  }
  StoreOptions store;
  store.element = GENERATE(ElementType::f16, ElementType::f32);
  store.queries = QueryChoice::parse(GENERATE("all", "window:10"));
  store.w_o = GENERATE(false, true);
  store.layers = {1, 4};
  const Pos prompt_len = 3000, n_tokens = 9000;
  const std::uint64_t bytes = trace_bytes(model, store, prompt_len, n_tokens, 7);

  const RecordPlan plan = record_plan(model.config, store, prompt_len, n_tokens);
  TraceInfo meta;
  meta.model_name = "small";
  meta.n_layers = 6;
  meta.n_heads = 4;
  meta.n_kv_heads = 2;
  meta.head_dim = meta.v_head_dim = 8;
  meta.attention_scale = 1;
  meta.prompt_len = prompt_len;
  meta.element = store.element;
  meta.layers = store.layers;
  const auto path = std::filesystem::temp_directory_path() / ("kvreplay_job_" + std::to_string(::getpid()) + ".h5");
  WriterOptions layout;
  layout.queries = plan.queries;
  layout.outputs = plan.outputs;
  layout.hidden = store.w_o ? 24 : 0;
  layout.w_o_type = ElementType::bf16;
  layout.logprob = true;
  layout.piece_bytes = 7;
  TraceWriter writer(path, meta, n_tokens, layout);
  const auto found = std::filesystem::file_size(writer.part_path());
  writer.discard();
  CHECK(bytes >= found);
  CHECK(bytes < found + 80000);
}

TEST_CASE("sizes are said in units, and free space of a folder that is not there yet is known") {
  CHECK(bytes_text(1023) == "1023 B");
  CHECK(bytes_text(std::uint64_t{5} << 29) == "2.5 GiB");
  CHECK(free_bytes("/tmp/not/there/yet") > 0);
  CHECK(free_bytes("not-there") > 0);
}

}  // namespace kvreplay
