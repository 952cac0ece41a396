#include "traces/writer.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "tests/traces/fixtures.hpp"
#include "traces/hash.hpp"
#include "traces/recover.hpp"
#include "traces/repack.hpp"
#include "traces/verify.hpp"

namespace kvreplay::test {

TEST_CASE("a killed writer leaves a readable file, which recover makes whole") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  const TraceInfo meta = small_meta();
  const std::vector<Pos> queries = queries_window(5, 15, 40);
  const pid_t child = ::fork();
  if (child == 0) {
    WriterOptions options;
    options.queries = queries;
    TraceWriter writer(path, meta, 40, options);
    append_small(writer, meta, queries, 0, 20);
    writer.commit(20);
    append_small(writer, meta, queries, 20, 27);
    writer.commit(26);
    append_small(writer, meta, queries, 27, 30);
    ::_exit(0);  // no destructor, no close
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(status == 0);
  CHECK_FALSE(std::filesystem::exists(path));

  const auto part = folder / "t.h5.part";
  const TraceReader trace(part);
  CHECK(trace.info().n_tokens == 26);
  CHECK(trace.info().stem == "t");
  CHECK_FALSE(trace.info().complete);
  CHECK(trace.q_index(1).size() == 16);
  std::vector<float> k(26 * 8);
  trace.read_k(3, 1, 0, 26, k);
  CHECK(k[25 * 8 + 2] == value_at(3, 'k', 1, 25, 2));

  CHECK(recover(part, path) == 26);
  const TraceReader whole(path);
  CHECK(whole.info().complete);
  CHECK(whole.info().n_tokens == 26);
  CHECK(whole.info().content_hash == hash_trace(trace).content);
  CHECK(verify(whole).failures.empty());
  CHECK_THROWS_AS(recover(path, folder / "again.h5"), std::invalid_argument);

  // What recover made is what an uninterrupted capture of these tokens would have made.
  TraceWriter writer(folder / "short.h5", meta, 26, WriterOptions{.queries = queries_window(5, 15, 26)});
  append_small(writer, meta, queries, 0, 26);
  writer.close();
  CHECK(TraceReader(folder / "short.h5").info().content_hash == whole.info().content_hash);
}

TEST_CASE("repacking there and back changes no content") {
  const TemporaryFolder folder;
  for (const ElementType element : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    write_small(folder / "a.h5", {.element = element, .queries = queries_decode(15, 40), .extras = true});
    repack(folder / "a.h5", folder / "b.h5",
           {.profile = Profile::archive, .archive = {.chunk_tokens = 7, .deflate = 9}});
    repack(folder / "b.h5", folder / "c.h5");
    const TraceReader a(folder / "a.h5"), b(folder / "b.h5"), c(folder / "c.h5");
    CHECK(a.info().content_hash == hash_trace(a).content);
    CHECK(hash_trace(b).content == a.info().content_hash);
    CHECK(hash_trace(c).arrays == hash_trace(a).arrays);
    CHECK(c.info().uuid == a.info().uuid);
    CHECK(c.info().pieces == a.info().pieces);
    CHECK(c.info().rope.inv_freq == a.info().rope.inv_freq);
    repack(folder / "b.h5", folder / "d.h5");
    CHECK((file_bytes(folder / "c.h5") == file_bytes(folder / "d.h5")));  // same command, same bytes
    CHECK_FALSE(std::filesystem::exists(folder / "b.h5.packing"));
  }
}

TEST_CASE("the hash depends on content and on nothing else") {
  const TemporaryFolder folder;
  write_small(folder / "a.h5");
  write_small(folder / "b.h5", {.profile = Profile::archive});
  write_small(folder / "c.h5", {.shape = {.prompt_len = 16}});
  write_small(folder / "d.h5", {.element = ElementType::bf16});
  const auto hash = [&](const char* name) { return TraceReader(folder / name).info().content_hash; };
  CHECK(hash("a.h5") == hash("b.h5"));
  CHECK(hash("a.h5") != hash("c.h5"));
  CHECK(hash("a.h5") != hash("d.h5"));
}

TEST_CASE("an interrupted capture is recovered under its own final name") {
  const TemporaryFolder folder;
  {
    TraceWriter writer(folder / "t.h5", small_meta(), 40, WriterOptions{.queries = queries_all(40)});
    append_small(writer, small_meta(), queries_all(40), 0, 30);
    writer.commit(25);
  }
  CHECK(recover(folder / "t.h5.part", folder / "t.h5") == 25);
  CHECK(verify(TraceReader(folder / "t.h5")).failures.empty());
  CHECK(TraceReader(folder / "t.h5.part").info().n_tokens == 25);  // the input is left as it was
}

TEST_CASE("repacking can name spans, and changes nothing else") {
  const TemporaryFolder folder;
  write_small(folder / "a.h5", {.queries = queries_decode(15, 40), .extras = true});
  const TraceReader a(folder / "a.h5");
  REQUIRE(a.info().spans.size() == 1);
  const Span own = a.info().spans[0];
  repack(folder / "a.h5", folder / "b.h5", {.spans = {{"question", 10, 15}, {"all", 0, 40}}});
  const TraceReader b(folder / "b.h5");
  CHECK(b.info().spans == std::vector<Span>{own, {"question", 10, 15}, {"all", 0, 40}});
  CHECK(hash_trace(b).arrays == hash_trace(a).arrays);
  CHECK(hash_trace(b).content == b.info().content_hash);
  CHECK(b.info().content_hash != a.info().content_hash);
  repack(folder / "b.h5", folder / "c.h5", {.profile = Profile::archive, .spans = {{"question", 0, 1}}});
  CHECK(TraceReader(folder / "c.h5").info().spans == std::vector<Span>{own, {"question", 0, 1}, {"all", 0, 40}});
  for (const Span& bad : {Span{"", 0, 1}, Span{"x", 5, 5}, Span{"x", -1, 5}, Span{"x", 5, 41}}) {
    CHECK_THROWS_AS(repack(folder / "a.h5", folder / "d.h5", {.spans = {bad}}), std::invalid_argument);
  }
  CHECK_FALSE(std::filesystem::exists(folder / "d.h5"));
}

TEST_CASE("an unwritable place is one sentence and leaves nothing") {
  const TemporaryFolder folder;
  CHECK_THROWS_AS(write_small(folder / "no/such/folder/t.h5"), TraceError);
  write_small(folder / "a.h5");
  CHECK_THROWS(repack(folder / "a.h5", folder / "no/b.h5"));
  CHECK_FALSE(std::filesystem::exists(folder / "no"));
}

TEST_CASE("misuse of the writer is refused by name") {
  const TemporaryFolder folder;
  const TraceInfo meta = small_meta();
  const auto refused = [&](TraceInfo changed, Pos capacity = 40) {
    return message_of<std::invalid_argument>([&] { TraceWriter(folder / "x.h5", changed, capacity, {}); });
  };
  TraceInfo bad = meta;
  bad.n_kv_heads = 3;
  CHECK_THAT(refused(bad), Catch::Contains("multiple of n_kv_heads 3"));
  bad = meta;
  bad.prompt_len = 0;
  CHECK_THAT(refused(bad), Catch::Contains("prompt_len 0"));
  bad = meta;
  bad.layers = {1, 4};
  CHECK_THAT(refused(bad), Catch::Contains("below n_layers = 4"));
  bad = meta;
  bad.rope.inv_freq.pop_back();
  CHECK_THAT(refused(bad), Catch::Contains("inv_freq has 3 values"));
  bad = meta;
  bad.attention_scale = NAN;
  CHECK_THAT(refused(bad), Catch::Contains("attention_scale"));
  CHECK_THAT(refused(meta, 14), Catch::Contains("prompt_len 15"));

  TraceWriter writer(folder / "t.h5", meta, 40, WriterOptions{.queries = queries_all(40)});
  CHECK_THROWS_AS(writer.close(), std::invalid_argument);  // no tokens yet
  append_small(writer, meta, queries_all(40), 0, 10);
  CHECK_THROWS_AS(writer.commit(11), std::invalid_argument);
  CHECK_THROWS_AS(append_small(writer, meta, queries_all(50), 10, 41), std::invalid_argument);
  std::vector<float> k(2 * 8), v(2 * 6), q(4 * 8);
  CHECK_THROWS_AS(writer.append(2, 1, k, v, q), std::invalid_argument);
  CHECK_THROWS_AS(writer.append(1, 1, k, v, k), std::invalid_argument);
  k[3] = 1e6F;
  CHECK_THAT(message_of<std::invalid_argument>([&] { writer.append(1, 1, k, v, q); }),
             Catch::Contains("does not fit f16"));
  k[3] = NAN;
  CHECK_THAT(message_of<std::invalid_argument>([&] { writer.append(1, 1, k, v, q); }), Catch::Contains("found nan"));
  writer.discard();
  CHECK_FALSE(std::filesystem::exists(folder / "t.h5.part"));
}

}  // namespace kvreplay::test
