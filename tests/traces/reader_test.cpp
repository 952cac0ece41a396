#include "traces/reader.hpp"

#include <catch2/catch.hpp>
#include <thread>

#include "tests/traces/fixtures.hpp"
#include "traces/hash.hpp"

namespace kvreplay::test {
namespace {

void expect_rows(const std::vector<float>& found, int layer, char what, int head, Pos begin, Pos end, int width) {
  std::size_t i = 0, wrong = 0;
  for (Pos pos = begin; pos < end; ++pos) {
    for (int channel = 0; channel < width; ++channel) {
      wrong += found[i++] == value_at(layer, what, head, pos, channel) ? 0 : 1;
    }
  }
  CHECK(i == found.size());
  CHECK(wrong == 0);
}

std::size_t n_values(Pos n, int width) { return static_cast<std::size_t>(n) * static_cast<std::size_t>(width); }

}  // namespace

TEST_CASE("what was written is read, for every element type, profile and stored query set") {
  const TemporaryFolder folder;
  const Shape shape;
  for (const ElementType element : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    for (const Profile profile : {Profile::working, Profile::archive}) {
      for (const std::vector<Pos>& queries :
           {queries_all(shape.n_tokens), queries_decode(shape.prompt_len, shape.n_tokens),
            queries_window(5, shape.prompt_len, shape.n_tokens)}) {
        const auto path = folder / "t.h5";
        write_small(path, {.shape = shape, .element = element, .profile = profile, .queries = queries, .extras = true});
        const TraceReader trace(path);
        const TraceInfo& info = trace.info();
        REQUIRE(info.element == element);
        REQUIRE(info.complete);
        REQUIRE(info.n_tokens == shape.n_tokens);
        REQUIRE(info.prompt_len == shape.prompt_len);
        REQUIRE(info.group_size == 2);
        REQUIRE(info.layers == std::vector<int>{1, 3});
        REQUIRE(info.sliding_window == std::vector<int>{0, 16, 0, 0});
        REQUIRE(info.spans == std::vector<Span>{{"needle", 3, 6}});
        REQUIRE(info.token_ids[7] == 107);
        REQUIRE(info.positions[7] == 7);
        REQUIRE(info.pieces[39] == "p39");
        REQUIRE(info.logprob[4] == -2.0F);
        REQUIRE(info.rope.inv_freq == std::vector<double>{1, 0.5, 0.25, 0.125});
        REQUIRE(std::vector<Pos>(trace.q_index(3).begin(), trace.q_index(3).end()) == queries);
        for (const int layer : info.layers) {
          std::vector<float> k(n_values(30, 8)), v(n_values(30, 6)), q(n_values(9, 8));
          trace.read_k(layer, 1, 7, 37, k);
          expect_rows(k, layer, 'k', 1, 7, 37, 8);
          trace.read_v(layer, 0, 7, 37, v);
          expect_rows(v, layer, 'v', 0, 7, 37, 6);
          trace.read_q(layer, 3, 30, 39, q);
          expect_rows(q, layer, 'q', 3, 30, 39, 8);
          CHECK(trace.hidden(layer) == 5);
          CHECK(trace.read_w_o(layer) == std::vector<float>(5 * 4 * 6, 0.5F));
          CHECK(trace.score_names(layer) == std::vector<std::string>{"magic"});
          CHECK(trace.read_scores(layer, "magic", 1) == std::vector<float>(40, 3.0F));
        }
      }
    }
  }
}

TEST_CASE("asking for what is not there says what is") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  write_small(path, {.queries = queries_decode(15, 40)});
  const TraceReader trace(path);
  std::vector<float> out(8);
  CHECK_THROWS_WITH(trace.read_k(2, 0, 0, 1, out), Catch::Contains("layer 2 is not in this trace; it has 1, 3"));
  CHECK_THROWS_WITH(trace.read_q(1, 0, 14, 15, out), Catch::Contains("only 25 are stored (tokens 15 to 39)"));
  CHECK_THROWS_AS(trace.read_k(1, 2, 0, 1, out), TraceError);
  CHECK_THROWS_AS(trace.read_k(1, -1, 0, 1, out), TraceError);
  CHECK_THROWS_AS(trace.read_k(1, 0, -1, 0, out), TraceError);
  CHECK_THROWS_AS(trace.read_k(1, 0, 40, 41, out), TraceError);
  CHECK_THROWS_AS(trace.read_k(1, 0, 0, 2, out), TraceError);  // the buffer holds one row
  CHECK_THROWS_AS(trace.read_q(1, 4, 20, 21, out), TraceError);
  CHECK_THROWS_AS(trace.read_w_o(1), TraceError);
  CHECK_FALSE(trace.has_w_o(1));
  CHECK_FALSE(trace.has_out(1));
  CHECK_THROWS_WITH(trace.read_scores(1, "x", 0), Catch::Contains("no scores named 'x'; it has none"));
  CHECK_THROWS_WITH(TraceReader(folder / "none.h5"), Catch::Contains("does not exist"));
}

TEST_CASE("many threads may read one trace at once") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  write_small(path, {.profile = Profile::archive});
  const TraceReader trace(path);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      std::vector<float> k(8);
      for (int i = 0; i < 400; ++i) {
        const Pos pos = static_cast<Pos>((i * 17 + id) % 40);
        trace.read_k(id % 2 == 0 ? 1 : 3, i % 2, pos, pos + 1, k);
        wrong[static_cast<std::size_t>(id)] += k[3] == value_at(id % 2 == 0 ? 1 : 3, 'k', i % 2, pos, 3) ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("a prompt of one token, and a trace of one token, are traces") {
  const TemporaryFolder folder;
  write_small(folder / "a.h5", {.shape = {.prompt_len = 1}});
  CHECK(TraceReader(folder / "a.h5").info().prompt_len == 1);
  write_small(folder / "b.h5", {.shape = {.n_heads = 1, .n_kv_heads = 1, .n_tokens = 10, .prompt_len = 10}});
  CHECK(TraceReader(folder / "b.h5").info().prompt_len == 10);
}

TEST_CASE("a trace that changes while it is used is noticed") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  write_small(path);
  const TraceReader trace(path);
  trace.check_unchanged();
  std::vector<char> bytes = file_bytes(path);

  std::filesystem::resize_file(path, bytes.size() - 4096);
  CHECK_THROWS_WITH(trace.check_unchanged(), Catch::Contains("changed while it was in use"));
  std::vector<float> out(8 * 40);
  const std::string message = message_of<TraceError>([&] {
    for (const int layer : {1, 3}) {
      for (int head = 0; head < 4; ++head) {
        trace.read_q(layer, head, 0, 40, out);
      }
    }
  });
  CHECK_THAT(message, Catch::Contains("while it was read"));

  std::filesystem::remove(path);
  CHECK_THROWS_WITH(trace.check_unchanged(), Catch::Contains("is gone"));
  write_bytes(path, bytes);
  CHECK_THROWS_WITH(trace.check_unchanged(), Catch::Contains("written again"));
}

}  // namespace kvreplay::test
