// The ring between a decoder and the file: order, waiting, and what happens when either side fails.
#include "trace_capture/recorder.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <csignal>
#include <limits>
#include <numeric>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

using Clock = std::chrono::steady_clock;

struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("kvreplay_recorder_" + std::to_string(::getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

RecordPlan small_plan(Pos capacity, std::vector<int> layers = {0, 2}) {
  RecordPlan plan;
  plan.n_heads = 4;
  plan.n_kv_heads = 2;
  plan.head_dim = 8;
  plan.layers = std::move(layers);
  plan.element = ElementType::f32;
  plan.capacity = capacity;
  plan.queries = queries_window(2, capacity / 2, capacity);
  plan.outputs = {capacity / 2, capacity - 1};
  return plan;
}

TraceInfo meta_of(const RecordPlan& plan) {
  TraceInfo meta;
  meta.model_name = "recorder-test";
  meta.n_layers = 3;
  meta.n_heads = plan.n_heads;
  meta.n_kv_heads = plan.n_kv_heads;
  meta.head_dim = meta.v_head_dim = plan.head_dim;
  meta.attention_scale = 0.5;
  meta.element = plan.element;
  meta.layers = plan.layers;
  meta.prompt_len = plan.capacity / 2;
  return meta;
}

WriterOptions options_of(const RecordPlan& plan) {
  WriterOptions options;
  options.queries = plan.queries;
  options.outputs = plan.outputs;
  options.logprob = true;
  return options;
}

// The value that every test stores: layer, kind (0 q, 1 k, 2 v, 3 out), token, head and channel tell it apart.
float value_of(int layer, int kind, Pos token, int head, int channel) {
  return static_cast<float>((((layer * 4 + kind) * 512 + token) * 4 + head) * 8 + channel);
}

struct Rows {
  std::vector<float> q, k, v, out;
  LayerRows view() const { return {.q = q, .k = k, .v = v, .out = out}; }
};

Rows rows_of(const RecordPlan& plan, int layer, Pos first, Pos n) {
  Rows rows;
  for (Pos token = first; token < first + n; ++token) {
    for (int head = 0; head < plan.n_heads; ++head) {
      for (int channel = 0; channel < plan.head_dim; ++channel) {
        rows.q.push_back(value_of(layer, 0, token, head, channel));
        rows.out.push_back(value_of(layer, 3, token, head, channel));
        if (head < plan.n_kv_heads) {
          rows.k.push_back(value_of(layer, 1, token, head, channel));
          rows.v.push_back(value_of(layer, 2, token, head, channel));
        }
      }
    }
  }
  return rows;
}

void tell_tokens(Recorder& recorder, Pos first, Pos n) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  std::iota(ids.begin(), ids.end(), 100 + first);
  const std::vector<float> logprob(ids.size(), -1.5F);
  recorder.tokens(ids, logprob);
}

void record_pass(Recorder& recorder, Pos first, Pos n) {
  for (int layer = 0; layer < 3; ++layer) {
    recorder.record(layer, first, n, rows_of(recorder.plan(), layer, first, n).view());
  }
  tell_tokens(recorder, first, n);
}

void check_trace(const std::filesystem::path& path, const RecordPlan& plan, Pos n_tokens) {
  const TraceReader trace(path);
  REQUIRE(trace.info().n_tokens == n_tokens);
  REQUIRE(trace.info().token_ids.back() == 100 + n_tokens - 1);
  REQUIRE(trace.info().layers == plan.layers);
  const std::size_t n = static_cast<std::size_t>(n_tokens), d = static_cast<std::size_t>(plan.head_dim);
  for (const int layer : plan.layers) {
    std::vector<float> rows(n * d), row(d);
    const auto expect = [&](const std::vector<float>& found, int kind, Pos first, int head) {
      for (std::size_t i = 0; i < found.size(); ++i) {
        const Pos token = first + static_cast<Pos>(i / d);
        REQUIRE(found[i] == value_of(layer, kind, token, head, static_cast<int>(i % d)));
      }
    };
    for (int head = 0; head < plan.n_kv_heads; ++head) {
      trace.read_k(layer, head, 0, n_tokens, rows);
      expect(rows, 1, 0, head);
      trace.read_v(layer, head, 0, n_tokens, rows);
      expect(rows, 2, 0, head);
    }
    for (int head = 0; head < plan.n_heads; ++head) {
      for (const Pos token : trace.q_index(layer)) {
        trace.read_q(layer, head, token, token + 1, row);
        expect(row, 0, token, head);
      }
      for (const Pos token : trace.out_index(layer)) {
        trace.read_out(layer, head, token, token + 1, row);
        expect(row, 3, token, head);
      }
    }
  }
}

}  // namespace

TEST_CASE("what is recorded pass by pass is what the file holds") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(40);
  const Pos max_pass = GENERATE(1, 3, 7, 512);  // passes longer than a packet are cut
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  {
    Recorder recorder(plan, writer, {.stage_bytes = 1, .max_pass = max_pass, .commit_seconds = 0});
    REQUIRE(recorder.n_slots() == 2);
    REQUIRE(recorder.fits(1));
    REQUIRE(recorder.index_of(0) == 0);
    REQUIRE(recorder.index_of(1) == -1);
    REQUIRE(recorder.index_of(2) == 1);
    Pos first = 0;
    for (const Pos n : {10, 10, 1, 1, 1, 17}) {
      record_pass(recorder, first, n);
      first += n;
    }
    recorder.finish();
    REQUIRE(writer.n_committed() == 40);
    const std::uint64_t floats = 2 * (2 * 2 * 40 + 4 * (plan.queries.size() + plan.outputs.size())) * 8;
    REQUIRE(recorder.rates().bytes == floats * sizeof(float));
  }
  writer.close();
  check_trace(path, plan, 40);
}

TEST_CASE("all layers of a step travel in one packet, and steps that wait are written together") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(40);
  const bool wait = GENERATE(false, true);
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  {
    Recorder recorder(plan, writer, {.stage_bytes = 1 << 20, .max_pass = 6, .commit_seconds = 0});
    std::atomic<bool> all_there = !wait;
    for (Pos token = 0; token < 40;) {
      const Pos n = token == 30 ? 3 : 1;
      const Recorder::Slot slot = recorder.acquire(token, n, 0, 2);
      for (std::size_t i = 0; i < 2; ++i) {
        pack(plan, slot.layout, i, rows_of(plan, plan.layers[i], token, n).view(), slot.bytes);
      }
      recorder.submit(slot, [&all_there] {
        while (!all_there) {
          std::this_thread::yield();
        }
      });
      tell_tokens(recorder, token, n);
      token += n;
    }
    all_there = true;
    recorder.finish();
    REQUIRE(writer.n_committed() == 40);
  }
  writer.close();
  check_trace(path, plan, 40);
}

TEST_CASE("a decoder that is faster than the file waits, loses nothing, and the wait is counted") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(16, {2});
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  std::atomic<int> in_flight = 0, most = 0, n_ready = 0;
  std::atomic<bool> in_order = true;
  std::vector<std::thread::id> readers;  // written by the writer thread alone, read after finish
  {
    Recorder recorder(plan, writer, {.stage_bytes = 1, .max_pass = 1});
    for (Pos token = 0; token < 16; ++token) {
      const Recorder::Slot slot = recorder.acquire(token, 1, 0, 1);
      REQUIRE(slot.index < recorder.n_slots());
      most = std::max(most.load(), ++in_flight);
      const Rows rows = rows_of(plan, 2, token, 1);
      recorder.submit(slot, [&plan, &in_flight, &n_ready, &in_order, &readers, slot, rows, token] {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        in_order = in_order && n_ready == token;              // of submission
        pack(plan, slot.layout, 0, rows.view(), slot.bytes);  // complete only now, as a copy from a device is
        readers.push_back(std::this_thread::get_id());
        ++n_ready;
        --in_flight;
      });
      tell_tokens(recorder, token, 1);
    }
    recorder.finish();
    const Recorder::Rates rates = recorder.rates();
    REQUIRE(rates.stall_seconds > 0.03);
    REQUIRE(rates.write_seconds > 0.07);
  }
  REQUIRE(most <= 3);  // two slots, and one that the writer was done with but had not counted yet
  REQUIRE(in_order);
  REQUIRE(readers.size() == 16);
  for (const std::thread::id& id : readers) {
    REQUIRE(id == readers[0]);
    REQUIRE(id != std::this_thread::get_id());
  }
  writer.close();
  check_trace(path, plan, 16);
}

TEST_CASE("what was recorded long enough ago survives a crash") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(16);
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  Recorder recorder(plan, writer, {.commit_seconds = 0.02});
  record_pass(recorder, 0, 9);
  // Rows of token 9, but not its id: it does not count yet.
  for (const int layer : plan.layers) {
    recorder.record(layer, 9, 1, rows_of(plan, layer, 9, 1).view());
  }
  // Nothing follows, and still it is committed: the file as another process sees it says so.
  const auto patience = Clock::now() + std::chrono::seconds(20);
  Pos found = 0;
  while (found != 9 && Clock::now() < patience) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    try {
      found = TraceReader(writer.part_path()).info().n_tokens;
    } catch (const TraceError&) {  // no token is valid yet
    }
  }
  REQUIRE(found == 9);
  check_trace(writer.part_path(), plan, 9);
}

TEST_CASE("a recorder that is destroyed writes what it was given") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(16);
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  {
    Recorder recorder(plan, writer, {});
    record_pass(recorder, 0, 16);
  }
  writer.close();
  check_trace(path, plan, 16);
}

TEST_CASE("an error of ready() or of the file reaches the decoder, and nobody hangs") {
  const Folder folder;
  const RecordPlan plan = small_plan(16, {2});
  TraceWriter writer(folder.path / "t.h5", meta_of(plan), plan.capacity, options_of(plan));
  int released = 0;
  {
    Recorder recorder(plan, writer,
                      {.stage_bytes = 1,
                       .max_pass = 1,
                       .memory = {[](std::size_t bytes) { return host_memory().allocate(bytes); },
                                  [&](std::byte* slot) {
                                    host_memory().release(slot);
                                    ++released;
                                  }}});
    record_pass(recorder, 0, 1);
    std::atomic<bool> later_called = false;
    const Recorder::Slot slot = recorder.acquire(1, 1, 0, 1), next = recorder.acquire(2, 1, 0, 1);
    recorder.submit(slot, [] { throw std::runtime_error("the copy failed"); });
    recorder.submit(next, [&] { later_called = true; });  // its copy may be under way: waited for all the same
    REQUIRE_THROWS_WITH(
        [&] {
          for (Pos token = 3; token < 16; ++token) {
            recorder.submit(recorder.acquire(token, 1, 0, 1));
          }
        }(),
        "the copy failed");
    REQUIRE_THROWS_WITH(recorder.finish(), "the copy failed");
    REQUIRE_THROWS_WITH(recorder.finish(), "the copy failed");
    REQUIRE(later_called);
  }
  REQUIRE(released == 2);
}

TEST_CASE("a file that cannot grow is a TraceError, and what was committed stays readable") {
  const Folder folder;
  const auto path = folder.path / "t.h5";
  const RecordPlan plan = small_plan(400);
  TraceWriter writer(path, meta_of(plan), plan.capacity, options_of(plan));
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  {
    Recorder recorder(plan, writer, {.stage_bytes = 1, .max_pass = 8, .commit_seconds = 0});
    record_pass(recorder, 0, 8);
    recorder.finish();
    rlimit small = before;
    small.rlim_cur = 4096;
    ::setrlimit(RLIMIT_FSIZE, &small);
    CHECK_THROWS_AS(
        [&] {
          for (Pos first = 8; first < 400; first += 8) {
            record_pass(recorder, first, 8);
          }
          recorder.finish();
        }(),
        TraceError);
    ::setrlimit(RLIMIT_FSIZE, &before);
  }
  ::signal(SIGXFSZ, handler);
  REQUIRE(writer.n_committed() == 8);
  check_trace(writer.part_path(), plan, 8);
}

TEST_CASE("a value that the element type cannot hold is refused with its place") {
  const Folder folder;
  RecordPlan plan = small_plan(16, {2});
  plan.element = GENERATE(ElementType::f16, ElementType::bf16, ElementType::f32);
  TraceWriter writer(folder.path / "t.h5", meta_of(plan), plan.capacity, options_of(plan));
  Recorder recorder(plan, writer, {});
  Rows rows = rows_of(plan, 0, 0, 10);
  SECTION("too large") {
    rows.v[(7 * 2 + 1) * 8 + 3] = -65520;  // rounds to infinity as f16
    recorder.record(2, 0, 10, rows.view());
    tell_tokens(recorder, 0, 10);
    if (plan.element == ElementType::f16) {
      REQUIRE_THROWS_AS(recorder.finish(), ConfigError);
      REQUIRE_THROWS_WITH(recorder.finish(), Catch::Contains("layer 2: v of head 1 at token 7") &&
                                                 Catch::Contains("65504") && Catch::Contains("--dtype bf16"));
    } else {
      REQUIRE_NOTHROW(recorder.finish());
    }
  }
  SECTION("not a number, where queries are a part of the tokens") {
    rows.q[(9 * 4 + 2) * 8] = std::numeric_limits<float>::quiet_NaN();
    recorder.record(2, 0, 10, rows.view());
    REQUIRE_THROWS_WITH(recorder.finish(), Catch::Contains("q of head 2 at token 9") && Catch::Contains("finite"));
  }
  SECTION("an output") {
    rows.out[(8 * 4 + 3) * 8 + 7] = std::numeric_limits<float>::infinity();
    recorder.record(2, 0, 10, rows.view());
    REQUIRE_THROWS_WITH(recorder.finish(), Catch::Contains("output of head 3 at token 8"));
  }
}

}  // namespace kvreplay
