// The C ABI: what goes in by any route comes out of the file; what cannot be right is refused in a sentence.
#include "trace_capture/kvt.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cmath>
#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/traces/fixtures.hpp"
#include "traces/reader.hpp"
#include "traces/verify.hpp"

namespace kvreplay {

using nlohmann::json;
using test::TemporaryFolder;

namespace {

constexpr const char* kKinds[] = {"k", "v", "q", "out"};

json small_meta() {
  return json::parse(R"({
    "model": {"name": "small", "architecture": "Small", "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8,
              "v_head_dim": 6, "attention_scale": 0.25, "qk_norm": true, "logit_softcap": 30,
              "sliding_window": [0, 16, 0, 0], "dtype": "bf16", "config_json": {"a": 1}, "weights_hash": "h"},
    "rope": {"style": "half", "rotary_dim": 8, "inv_freq": [1, 0.5, 0.25, 0.125], "theta": 10000,
             "scaling": {"type": "none"}},
    "prompt_len": 15, "capacity": 40, "layers": [3, 1], "element": "f16", "queries": "window:4",
    "outputs": [14, 15, 39], "logprobs": true, "spans": [{"name": "needle", "begin": 3, "end": 6}],
    "generator": {"tool": "kvt_test"}, "provenance": "numbers"})");
}

// Owns rows of one element type in some layout: what an engine has.
struct Memory {
  std::vector<std::byte> bytes;
  kvt_rows rows{};
};

enum class Layout { head_major, token_major, padded, backwards };

// Multiples of 1/8, exact in every element type.
Memory memory(kvt_dtype dtype, Layout layout, int layer, kvt_kind kind, int heads, int width, Pos first, Pos n) {
  const auto type = static_cast<ElementType>(dtype);
  const auto size = static_cast<std::int64_t>(size_of(type)), row = width * size;
  Memory m;
  std::int64_t head = n * row, token = row, begin = 0, total = heads * n * row;
  if (layout == Layout::token_major) {
    head = row;
    token = heads * row;
  } else if (layout == Layout::padded) {  // odd paddings: nothing is aligned
    token = row + 3;
    head = n * token + 5;
    total = heads * head;
  } else if (layout == Layout::backwards) {
    head = -n * row;
    token = -row;
    begin = total - row;
  }
  m.bytes.assign(static_cast<std::size_t>(std::max<std::int64_t>(total, 1)), std::byte{0xff});  // NaN between the rows
  std::vector<float> values(static_cast<std::size_t>(width));
  for (int h = 0; h < heads; ++h) {
    for (Pos t = 0; t < n; ++t) {
      for (int c = 0; c < width; ++c) {
        values[static_cast<std::size_t>(c)] = test::value_at(layer, kKinds[kind][0], h, first + t, c);
      }
      narrow(type, values, m.bytes.data() + begin + h * head + t * token);
    }
  }
  m.rows = {dtype, m.bytes.data() + begin, head, token, 0, nullptr};
  return m;
}

struct Opened {
  kvt_trace* trace = nullptr;
  json meta;

  Opened(const std::filesystem::path& path, json description) : meta(std::move(description)) {
    const kvt_status status = kvt_open(path.c_str(), meta.dump().c_str(), &trace);
    INFO(kvt_last_error());
    REQUIRE(status == KVT_OK);
  }
  int heads(kvt_kind kind) const { return meta["model"][kind == KVT_K || kind == KVT_V ? "n_kv_heads" : "n_heads"]; }
  int width(kvt_kind kind) const {
    return kind == KVT_K || kind == KVT_Q ? meta["model"]["head_dim"].get<int>()
                                          : meta["model"].value("v_head_dim", meta["model"]["head_dim"].get<int>());
  }
  kvt_status append(int layer, kvt_kind kind, Pos first, Pos n, kvt_dtype dtype = KVT_F32,
                    Layout layout = Layout::head_major) const {
    const Memory m = memory(dtype, layout, layer, kind, heads(kind), width(kind), first, n);
    return kvt_append(trace, layer, kind, first, n, &m.rows);
  }
  void append_all(Pos first, Pos n) const {
    for (const int layer : meta["layers"].get<std::vector<int>>()) {
      for (const kvt_kind kind : {KVT_K, KVT_V, KVT_Q, KVT_OUT}) {
        INFO(kvt_last_error());
        REQUIRE(append(layer, kind, first, n) == KVT_OK);
      }
    }
  }
  kvt_status commit(Pos first, Pos n) const {
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs;
    for (Pos t = first; t < first + n; ++t) {
      ids.push_back(100 + t);
      logprobs.push_back(-static_cast<float>(t) / 8);
    }
    return kvt_commit(trace, n, ids.data(), meta.value("logprobs", false) ? logprobs.data() : nullptr);
  }
};

void check_rows(const TraceReader& trace, int layer, Pos n_tokens) {
  const TraceInfo& info = trace.info();
  const auto check = [&](kvt_kind kind, int heads, int width, const std::vector<Pos>& tokens, auto&& read) {
    for (int head = 0; head < heads; ++head) {
      for (const Pos pos : tokens) {
        std::vector<float> row(static_cast<std::size_t>(width));
        read(head, pos, row);
        for (int c = 0; c < width; ++c) {
          if (row[static_cast<std::size_t>(c)] != test::value_at(layer, kKinds[kind][0], head, pos, c)) {
            FAIL("layer " << layer << " " << kKinds[kind] << " head " << head << " token " << pos << " channel " << c);
          }
        }
      }
    }
  };
  check(KVT_K, info.n_kv_heads, info.head_dim, queries_all(n_tokens),
        [&](int head, Pos pos, std::vector<float>& row) { trace.read_k(layer, head, pos, pos + 1, row); });
  check(KVT_V, info.n_kv_heads, info.v_head_dim, queries_all(n_tokens),
        [&](int head, Pos pos, std::vector<float>& row) { trace.read_v(layer, head, pos, pos + 1, row); });
  const auto q_index = trace.q_index(layer), out_index = trace.out_index(layer);
  check(KVT_Q, info.n_heads, info.head_dim, {q_index.begin(), q_index.end()},
        [&](int head, Pos pos, std::vector<float>& row) { trace.read_q(layer, head, pos, pos + 1, row); });
  check(KVT_OUT, info.n_heads, info.v_head_dim, {out_index.begin(), out_index.end()},
        [&](int head, Pos pos, std::vector<float>& row) { trace.read_out(layer, head, pos, pos + 1, row); });
}

bool hashes_hold(const TraceReader& trace) {
  for (const std::string& failure : verify(trace).failures) {
    if (failure.find("hash") != std::string::npos) {
      return false;
    }
  }
  return true;
}

// The refusal of a description, or "" if it is taken.
std::string refusal(const std::filesystem::path& path, const std::string& meta) {
  kvt_trace* trace = nullptr;
  const kvt_status status = kvt_open(path.c_str(), meta.c_str(), &trace);
  if (status == KVT_OK) {
    REQUIRE(kvt_close(trace, 0) == KVT_OK);
    return "";
  }
  REQUIRE(trace == nullptr);
  return kvt_last_error();
}

bool mentions(const std::string& sentence, const std::string& words) {
  INFO(sentence << " / " << words);
  CHECK(sentence.find(words) != std::string::npos);
  return sentence.find(words) != std::string::npos;
}

}  // namespace

TEST_CASE("everything of the description is in the file") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  const Opened open(path, small_meta());
  CHECK(std::filesystem::exists(path.string() + ".part"));
  open.append_all(0, 15);
  REQUIRE(open.commit(0, 15) == KVT_OK);
  for (Pos t = 15; t < 40; ++t) {
    open.append_all(t, 1);
  }
  REQUIRE(open.commit(15, 25) == KVT_OK);
  REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
  CHECK_FALSE(std::filesystem::exists(path.string() + ".part"));

  const TraceReader trace(path);
  const TraceInfo& info = trace.info();
  CHECK(info.complete);
  CHECK(info.model_name == "small");
  CHECK(info.architecture == "Small");
  CHECK(info.config_json == R"({"a":1})");
  CHECK(info.weights_hash == "h");
  CHECK(info.dtype == "bf16");
  CHECK(info.qk_norm);
  CHECK(info.logit_softcap == 30);
  CHECK(info.attention_scale == 0.25);
  CHECK(info.sliding_window == std::vector<int>{0, 16, 0, 0});
  CHECK(info.rope.present);
  CHECK(info.rope.theta == 10000);
  CHECK(info.rope.inv_freq == std::vector<double>{1, 0.5, 0.25, 0.125});
  CHECK(info.rope.scaling_json == R"({"type":"none"})");
  CHECK(info.rope.invertible);
  CHECK(info.n_tokens == 40);
  CHECK(info.prompt_len == 15);
  CHECK(info.layers == std::vector<int>{1, 3});
  CHECK(info.element == ElementType::f16);
  CHECK(info.spans == std::vector<Span>{{"needle", 3, 6}});
  CHECK(info.generator == R"({"tool":"kvt_test"})");
  CHECK(info.provenance == "numbers");
  CHECK(info.token_ids.front() == 100);
  CHECK(info.token_ids.back() == 139);
  CHECK(info.logprob[8] == -1);
  CHECK(trace.q_index(1).front() == 11);
  CHECK(trace.out_index(3).size() == 3);
  CHECK(hashes_hold(trace));
  for (const int layer : info.layers) {
    check_rows(trace, layer, 40);
  }
}

TEST_CASE("fewer tokens than the capacity, no logprobs known, and a generator of its own") {
  const TemporaryFolder folder;
  json meta = small_meta();
  meta.erase("generator");
  meta["model"].erase("v_head_dim");
  meta["model"]["sliding_window"] = 7;
  meta.erase("rope");
  const Opened open(folder / "t.h5", meta);
  open.append_all(0, 20);
  std::vector<std::int32_t> ids(18, 1);
  REQUIRE(kvt_commit(open.trace, 18, ids.data(), nullptr) == KVT_OK);
  REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
  const TraceReader trace(folder / "t.h5");
  CHECK(trace.info().n_tokens == 18);  // what was not committed is not there
  CHECK(std::isnan(trace.info().logprob[17]));
  CHECK(json::parse(trace.info().generator)["tool"] == "libkvt");
  CHECK(json::parse(trace.info().generator)["version"] == kvt_version());
  CHECK(trace.info().v_head_dim == 8);
  CHECK(trace.info().sliding_window == std::vector<int>{7, 7, 7, 7});
  CHECK_FALSE(trace.info().rope.present);
  CHECK(hashes_hold(trace));
}

TEST_CASE("rows of any type, layout and order become the same trace") {
  const TemporaryFolder folder;
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 60; ++round) {
    json meta = small_meta();
    const char* elements[] = {"f16", "bf16", "f32"};
    const char* queries[] = {"all", "decode", "window:4", "window:0", "window:1000"};
    meta["element"] = elements[round % 3];
    meta["queries"] = queries[below(5)];
    const int capacity = 1 + below(60);
    meta["capacity"] = capacity;
    meta["prompt_len"] = 1 + below(capacity);
    meta["spans"] = json::array();
    std::set<int> outputs;
    for (int i = below(6); i > 0; --i) {
      outputs.insert(below(capacity));
    }
    meta["outputs"] = outputs;
    const int n_tokens = 1 + below(capacity);
    const auto path = folder / (std::to_string(round) + ".h5");
    const Opened open(path, meta);

    Pos next[4][4] = {}, committed = 0;  // [layer][kind]
    const std::vector<int> layers = {1, 3};
    while (committed < n_tokens) {
      const int layer = layers[static_cast<std::size_t>(below(2))];
      const auto kind = static_cast<kvt_kind>(below(4));
      Pos& at = next[layer][kind];
      if (below(8) == 0) {  // a mistake, which must change nothing
        CHECK(open.append(layer, kind, at + 1 + below(3), 200) == KVT_USAGE);
        CHECK(open.append(2, kind, at, 1) == KVT_USAGE);
        CHECK(open.commit(committed, capacity + 1) == KVT_USAGE);
      }
      if (at < n_tokens) {
        const Pos n = std::min<Pos>(below(4) == 0 ? below(40) : below(4), n_tokens - at);
        INFO(round << ": layer " << layer << " " << kKinds[kind] << " " << at << " + " << n << ": "
                   << kvt_last_error());
        REQUIRE(open.append(layer, kind, at, n, static_cast<kvt_dtype>(below(3)), static_cast<Layout>(below(4))) ==
                KVT_OK);
        at += n;
      }
      Pos whole = n_tokens;
      for (const int l : layers) {
        for (const Pos done : next[l]) {
          whole = std::min(whole, done);
        }
      }
      if (whole > committed && (below(3) == 0 || whole == n_tokens)) {
        const Pos n = 1 + below(whole - committed);
        INFO(kvt_last_error());
        REQUIRE(open.commit(committed, n) == KVT_OK);
        committed += n;
      }
    }
    REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
    const TraceReader trace(path);
    REQUIRE(trace.info().n_tokens == n_tokens);
    CHECK(trace.info().token_ids.back() == 100 + n_tokens - 1);
    CHECK(hashes_hold(trace));
    for (const int layer : layers) {
      check_rows(trace, layer, n_tokens);
    }
  }
}

TEST_CASE("float32 is rounded to nearest even, and widening is exact") {
  const TemporaryFolder folder;
  json meta = small_meta();
  meta["model"] = {{"name", "one"},   {"n_layers", 1}, {"n_heads", 1},
                   {"n_kv_heads", 1}, {"head_dim", 4}, {"attention_scale", 1}};
  meta.erase("rope");
  meta.erase("layers");
  meta.erase("spans");
  meta["outputs"] = {0};
  meta["prompt_len"] = 1;
  meta["capacity"] = 1;
  meta["queries"] = "all";
  const float tie = 1 + 0x1p-11F;  // between two float16
  const float values[] = {tie, std::nextafter(tie, 2.0F), 0x1p-24F, -65504};
  const float as_f16[] = {1, 1 + 0x1p-10F, 0x1p-24F, -65504};
  const kvt_rows rows = {KVT_F32, values, 0, 0, 0, nullptr};
  const auto write = [&](const char* element, const std::filesystem::path& path) {
    meta["element"] = element;
    const Opened open(path, meta);
    for (const kvt_kind kind : {KVT_OUT, KVT_Q, KVT_V, KVT_K}) {
      REQUIRE(kvt_append(open.trace, 0, kind, 0, 1, &rows) == KVT_OK);
    }
    const std::int32_t id = 0;
    REQUIRE(kvt_commit(open.trace, 1, &id, nullptr) == KVT_OK);
    REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
  };
  write("f16", folder / "f16.h5");
  write("f32", folder / "f32.h5");
  std::vector<float> row(4);
  TraceReader(folder / "f16.h5").read_q(0, 0, 0, 1, row);
  CHECK(std::equal(row.begin(), row.end(), as_f16));
  TraceReader(folder / "f16.h5").read_out(0, 0, 0, 1, row);  // outputs stay float32, so that they can prove something
  CHECK(std::equal(row.begin(), row.end(), values));
  TraceReader(folder / "f32.h5").read_k(0, 0, 0, 1, row);
  CHECK(std::equal(row.begin(), row.end(), values));
}

TEST_CASE("values that are not finite or do not fit are refused with their place, and change nothing") {
  const TemporaryFolder folder;
  const Opened open(folder / "t.h5", small_meta());
  for (const Layout layout : {Layout::head_major, Layout::token_major, Layout::padded}) {
    Memory m = memory(KVT_F32, layout, 1, KVT_V, 2, 6, 0, 15);
    const auto put = [&](float value) {
      std::memcpy(m.bytes.data() + m.rows.stride_head + 9 * m.rows.stride_token + 4 * 4, &value, 4);
      return kvt_append(open.trace, 1, KVT_V, 0, 15, &m.rows);
    };
    CHECK(put(std::nanf("")) == KVT_USAGE);
    mentions(kvt_last_error(), "layer 1, v: token 9, head 1, channel 4 is nan, but must be finite");
    CHECK(put(-std::numeric_limits<float>::infinity()) == KVT_USAGE);
    mentions(kvt_last_error(), "layer 1, v: token 9, head 1, channel 4 is -inf");
    CHECK(put(70000) == KVT_USAGE);
    mentions(kvt_last_error(), "layer 1, v: token 9, head 1, channel 4 is 70000, which f16 cannot hold");
  }
  Memory half = memory(KVT_BF16, Layout::head_major, 1, KVT_V, 2, 6, 0, 15);
  const std::uint16_t large = 0x7f7f;  // 3.4e38
  std::memcpy(half.bytes.data() + 2, &large, 2);
  CHECK(kvt_append(open.trace, 1, KVT_V, 0, 15, &half.rows) == KVT_USAGE);
  mentions(kvt_last_error(), "token 0, head 0, channel 1 is 3.3895314e+38, which f16 cannot hold");
  const std::uint16_t infinite = 0x7f80;
  std::memcpy(half.bytes.data() + 2, &infinite, 2);
  CHECK(kvt_append(open.trace, 1, KVT_V, 0, 15, &half.rows) == KVT_USAGE);
  mentions(kvt_last_error(), "channel 1 is inf, but must be finite");
  // Of an output that is not stored nobody looks at the value.
  Memory out = memory(KVT_F32, Layout::head_major, 1, KVT_OUT, 4, 6, 0, 15);
  const float nan = std::nanf("");
  std::memcpy(out.bytes.data(), &nan, 4);
  CHECK(kvt_append(open.trace, 1, KVT_OUT, 0, 15, &out.rows) == KVT_OK);
  CHECK(open.append(1, KVT_V, 0, 15) == KVT_OK);
  CHECK(kvt_close(open.trace, 0) == KVT_OK);
}

TEST_CASE("calls that cannot be right are refused in a sentence") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  const Opened open(path, small_meta());
  const Memory m = memory(KVT_F32, Layout::head_major, 1, KVT_K, 2, 8, 0, 10);
  const auto refused = [&](const char* words, int layer, int kind, std::int64_t first, std::int64_t n, kvt_rows rows) {
    CHECK(kvt_append(open.trace, layer, static_cast<kvt_kind>(kind), first, n, &rows) == KVT_USAGE);
    mentions(kvt_last_error(), words);
  };
  refused("layer 0 is not in this trace; its layers are 1, 3", 0, KVT_K, 0, 10, m.rows);
  refused("kind 4 is unknown", 1, 4, 0, 10, m.rows);
  refused("kind -1 is unknown", 1, -1, 0, 10, m.rows);
  refused("layer 1, k: -1 rows from token 0 on lie outside the capacity of 40", 1, KVT_K, 0, -1, m.rows);
  refused("outside the capacity", 1, KVT_K, -5, 10, m.rows);
  refused("outside the capacity", 1, KVT_K, 0, 41, m.rows);
  refused("outside the capacity", 1, KVT_K, INT64_MAX, INT64_MAX, m.rows);
  refused("rows begin at token 1, but those of token 0 have not come", 1, KVT_K, 1, 1, m.rows);
  kvt_rows rows = m.rows;
  rows.dtype = static_cast<kvt_dtype>(3);
  refused("dtype 3 is unknown", 1, KVT_K, 0, 10, rows);
  rows = m.rows;
  rows.data = nullptr;
  refused("data is NULL", 1, KVT_K, 0, 10, rows);
  rows = m.rows;
  rows.on_device = 2;
  refused("on_device is 2", 1, KVT_K, 0, 10, rows);
  rows = m.rows;
  rows.stride_token = 8;  // elements, not bytes
  refused("rows of 32 bytes overlap; strides are in bytes", 1, KVT_K, 0, 10, rows);
  rows = m.rows;
  rows.stride_head = 64;  // inside the first head
  refused("overlap", 1, KVT_K, 0, 10, rows);
  rows = m.rows;
  rows.stride_token = 0;
  refused("overlap", 1, KVT_K, 0, 10, rows);
  rows.stride_token = INT64_MIN;
  refused("more than all memory", 1, KVT_K, 0, 10, rows);
  rows.stride_token = INT64_MAX / 4;
  refused("more than all memory", 1, KVT_K, 0, 10, rows);

  CHECK(kvt_append(open.trace, 1, KVT_K, 0, 10, nullptr) == KVT_USAGE);
  CHECK(kvt_append(nullptr, 1, KVT_K, 0, 10, &m.rows) == KVT_USAGE);
  int not_a_trace = 0;
  CHECK(kvt_append(reinterpret_cast<kvt_trace*>(&not_a_trace), 1, KVT_K, 0, 10, &m.rows) == KVT_USAGE);
  mentions(kvt_last_error(), "not open");

  CHECK(open.append(1, KVT_K, 0, 10) == KVT_OK);
  refused("layer 1, k: rows from token 3 on were appended already; the next is 10", 1, KVT_K, 3, 2, m.rows);
  CHECK(open.append(1, KVT_K, 10, 0) == KVT_OK);  // nothing is nothing
  // Queries from token 11 on are stored, and none before: those may be left out, the stored ones may not.
  CHECK(open.append(1, KVT_Q, 11, 2) == KVT_OK);
  CHECK(open.append(1, KVT_Q, 14, 1) == KVT_USAGE);
  mentions(kvt_last_error(), "rows begin at token 14, but those of token 13 have not come");

  CHECK(open.commit(0, 1) == KVT_USAGE);
  mentions(kvt_last_error(), "1 tokens cannot be committed, because layer 1 has no v of token 0 yet");
  for (const int layer : {1, 3}) {
    for (const kvt_kind kind : {KVT_K, KVT_V, KVT_Q}) {
      const Pos begin = layer == 1 && kind == KVT_K ? 10 : layer == 1 && kind == KVT_Q ? 13 : 0;
      CHECK(open.append(layer, kind, begin, 20 - begin) == KVT_OK);
    }
  }
  CHECK(open.commit(0, 14) == KVT_OK);
  CHECK(open.commit(14, 1) == KVT_USAGE);
  mentions(kvt_last_error(), "15 tokens cannot be committed, because layer 1 has no out of token 14 yet");
  CHECK(kvt_commit(open.trace, -1, nullptr, nullptr) == KVT_USAGE);
  CHECK(kvt_commit(open.trace, 27, nullptr, nullptr) == KVT_USAGE);
  mentions(kvt_last_error(), "27 more tokens cannot be committed: 14 of the capacity of 40 are");
  CHECK(kvt_commit(open.trace, 1, nullptr, nullptr) == KVT_USAGE);
  CHECK(kvt_commit(open.trace, 0, nullptr, nullptr) == KVT_OK);
  const std::int32_t negative = -1, id = 1;
  const float likely = 0.5F;
  CHECK(kvt_commit(open.trace, 1, &negative, nullptr) == KVT_USAGE);
  mentions(kvt_last_error(), "ids[0] is -1");
  CHECK(kvt_commit(open.trace, 1, &id, &likely) == KVT_USAGE);
  mentions(kvt_last_error(), "logprobs[0] is 0.5");

  kvt_trace* other = nullptr;
  CHECK(kvt_open(path.c_str(), small_meta().dump().c_str(), &other) == KVT_USAGE);
  mentions(kvt_last_error(), "is being written already");
  CHECK(kvt_open(nullptr, "{}", &other) == KVT_USAGE);
  CHECK(kvt_open("", "{}", &other) == KVT_USAGE);
  CHECK(kvt_open(path.c_str(), nullptr, &other) == KVT_USAGE);
  CHECK(kvt_open(path.c_str(), "{}", nullptr) == KVT_USAGE);
  CHECK(kvt_open((folder / "no/t.h5").c_str(), small_meta().dump().c_str(), &other) == KVT_TRACE);
  CHECK(other == nullptr);

  CHECK(kvt_close(open.trace, 1) == KVT_OK);
  CHECK(TraceReader(path).info().n_tokens == 14);
  CHECK(kvt_close(open.trace, 1) == KVT_USAGE);
  CHECK(open.append(1, KVT_K, 20, 1) == KVT_USAGE);
  CHECK(open.commit(14, 0) == KVT_USAGE);
  CHECK(kvt_close(nullptr, 1) == KVT_USAGE);
  const Opened again(path, small_meta());  // the name is free, and the old handle is not the new one
  CHECK(open.append(1, KVT_K, 0, 1) == KVT_USAGE);
  CHECK(kvt_close(again.trace, 0) == KVT_OK);
}

TEST_CASE("device rows without a device are a device error") {
  const TemporaryFolder folder;
  const Opened open(folder / "t.h5", small_meta());
  Memory m = memory(KVT_F32, Layout::head_major, 1, KVT_K, 2, 8, 0, 10);
  m.rows.on_device = 1;  // where there is a device, this pointer is not its memory
  CHECK(kvt_append(open.trace, 1, KVT_K, 0, 10, &m.rows) == KVT_DEVICE);
  CHECK(std::string(kvt_last_error()).size() > 20);
  m.rows.stride_token = -m.rows.stride_token;
  CHECK(kvt_append(open.trace, 1, KVT_K, 0, 10, &m.rows) == KVT_USAGE);
  CHECK(open.append(1, KVT_K, 0, 10) == KVT_OK);
  CHECK(kvt_close(open.trace, 0) == KVT_OK);
}

TEST_CASE("an abandoned, a discarded and an empty trace") {
  const TemporaryFolder folder;
  const auto part = [](const std::filesystem::path& path) { return std::filesystem::path(path.string() + ".part"); };

  const Opened abandoned(folder / "a.h5", small_meta());
  abandoned.append_all(0, 20);
  REQUIRE(abandoned.commit(0, 17) == KVT_OK);
  abandoned.append_all(20, 5);
  const TraceReader readable(part(folder / "a.h5"));  // as a killed process leaves it
  CHECK(readable.info().n_tokens == 17);
  CHECK_FALSE(readable.info().complete);
  check_rows(readable, 3, 17);

  const Opened discarded(folder / "d.h5", small_meta());
  discarded.append_all(0, 20);
  REQUIRE(discarded.commit(0, 20) == KVT_OK);
  CHECK(kvt_close(discarded.trace, 0) == KVT_OK);
  CHECK_FALSE(std::filesystem::exists(folder / "d.h5"));
  CHECK_FALSE(std::filesystem::exists(part(folder / "d.h5")));

  const Opened empty(folder / "e.h5", small_meta());
  empty.append_all(0, 20);
  CHECK(kvt_close(empty.trace, 1) == KVT_USAGE);
  mentions(kvt_last_error(), "no token was committed");
  CHECK_FALSE(std::filesystem::exists(folder / "e.h5"));
  CHECK_FALSE(std::filesystem::exists(part(folder / "e.h5")));
  CHECK(kvt_close(abandoned.trace, 1) == KVT_OK);
}

TEST_CASE("after a failed write only closing is of use, and what was committed is kept") {
  const TemporaryFolder folder;
  json meta = small_meta();
  meta["capacity"] = 4000;
  const Opened open(folder / "t.h5", meta);
  open.append_all(0, 100);
  REQUIRE(open.commit(0, 100) == KVT_OK);
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit none{1024, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_FSIZE, &none) == 0);
  const kvt_status k = open.append(1, KVT_K, 100, 50), v = open.append(1, KVT_V, 100, 50);
  const kvt_status q = open.append(1, KVT_Q, 100, 50);
  const std::string sentence = kvt_last_error();
  REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(k == KVT_OK);
  CHECK(v == KVT_OK);
  CHECK(q == KVT_TRACE);
  mentions(sentence, "cannot be written");
  CHECK(open.append(3, KVT_K, 100, 50) == KVT_TRACE);
  mentions(kvt_last_error(), "failed before");
  CHECK(open.commit(100, 1) == KVT_TRACE);
  CHECK(kvt_close(open.trace, 1) == KVT_OK);
  const TraceReader trace(folder / "t.h5");
  CHECK(trace.info().n_tokens == 100);
  check_rows(trace, 1, 100);
}

TEST_CASE("descriptions are taken at their word") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  const auto refuses = [&](const std::string& pointer, const json& value, const std::string& words) {
    json meta = small_meta();
    meta[json::json_pointer(pointer)] = value;
    const std::string sentence = refusal(path, meta.dump());
    INFO(pointer << " = " << value.dump());
    CHECK(sentence.rfind("meta_json: ", 0) == 0);
    mentions(sentence, words);
    CHECK_FALSE(std::filesystem::exists(path.string() + ".part"));
  };
  CHECK(refusal(path, small_meta().dump()).empty());
  refuses("/promt_len", 3, "unknown key \"promt_len\"; the nearest is prompt_len");
  refuses("/model/heads", 3, "unknown key model.\"heads\"; the nearest is n_heads");
  refuses("/rope/freq", 3, "the nearest is inv_freq");
  refuses("/spans/0/start", 3, "unknown key spans[0].\"start\"");
  refuses("/model", nullptr, "model is missing");
  refuses("/model", 3, "model is 3, but must be an object");
  refuses("/model/name", nullptr, "model.name is missing; it is text");
  refuses("/model/name", 3, "model.name is 3, but must be text");
  refuses("/model/name", std::string("a\0b", 3), "zero byte");
  refuses("/model/n_layers", 0, "model.n_layers is 0, but must be an integer from 1 to 4096");
  refuses("/model/n_layers", 1.0, "must be an integer");
  refuses("/model/n_layers", "4", "must be an integer");
  refuses("/model/n_layers", 18446744073709551615ULL, "must be an integer");
  refuses("/model/n_heads", 5, "model.n_kv_heads is 2, but must divide n_heads = 5");
  refuses("/model/n_kv_heads", 8, "model.n_kv_heads is 8, but must be an integer from 1 to 4");
  refuses("/model/head_dim", nullptr, "model.head_dim is missing");
  refuses("/model/attention_scale", 0, "must be a positive number");
  refuses("/model/attention_scale", nullptr, "model.attention_scale is missing");
  refuses("/model/logit_softcap", -1, "must be 0 (none) or a positive number");
  refuses("/model/qk_norm", 1, "model.qk_norm is 1, but must be true or false");
  refuses("/model/sliding_window", json::array({1, 2}), "has 2 values, but must have one for each of the 4 layers");
  refuses("/model/sliding_window/2", -1, "model.sliding_window[2] is -1");
  refuses("/model/config_json", 3, "must be text or an object");
  refuses("/rope/style", "halv", "the nearest is half");
  refuses("/rope/rotary_dim", 6, "rope.inv_freq has 4 values and rotary_dim is 6");
  refuses("/rope/rotary_dim", 10, "rope.rotary_dim is 10");
  refuses("/rope/inv_freq", json::array(), "rope.inv_freq has 0 values");
  refuses("/rope/inv_freq/1", -1, "rope.inv_freq[1] is -1");
  refuses("/rope/attention_factor", 0, "must be a positive number");
  refuses("/prompt_len", 0, "prompt_len is 0, but must be an integer from 1 to 40");
  refuses("/prompt_len", 41, "prompt_len is 41");
  refuses("/capacity", 0, "capacity is 0");
  refuses("/capacity", 4294967296, "capacity is 4294967296");
  refuses("/layers", json::array(), "at least one layer");
  refuses("/layers", json::array({1, 1}), "none of them twice");
  refuses("/layers/0", 4, "layers[0] is 4, but must be an integer from 0 to 3");
  refuses("/element", "fp16", "element is \"fp16\", but must be f16, bf16 or f32; the nearest is f16");
  refuses("/element", nullptr, "element is missing");
  for (const char* queries :
       {"some", "window:", "window:-1", "window:1x", "window:99999999999999999999", "window:2 "}) {
    refuses("/queries", queries, "must be all, decode or window:N");
  }
  refuses("/outputs", 3, "outputs is 3, but must be a list");
  refuses("/outputs/0", 40, "outputs[0] is 40, but must be an integer from 0 to 39");
  refuses("/outputs/0", 15, "outputs names token 15 twice");
  refuses("/spans/0/end", 2, "spans[0].end is 2, but must be an integer from 3 to 40");
  refuses("/spans/0/name", "", "spans[0].name is empty");
  refuses("/logprobs", "yes", "logprobs is \"yes\"");

  const auto broken = [&](const std::string& text, const std::string& words) { mentions(refusal(path, text), words); };
  broken("", "expected JSON, found none");
  broken("[]", "expected a JSON object, found []");
  broken("{\"model\": }", "expected JSON, found none from byte 11 on");
  broken("{\"capacity\": 1e999}", "too large");
  broken("{\"model\": {\"name\": \"\xff\"}}", "expected JSON, found none");
  broken("{\"capacity\": 3, \"capacity\": 4}", "the name \"capacity\" is there twice");
  broken("{\"model\": {\"name\": \"a\", \"name\": \"b\"}}", "the name \"name\" is there twice");
  broken(std::string(100000, '['), "nested deeper");
  std::string deep = "1";
  for (int i = 0; i < 3000; ++i) {
    deep = "{\"a\":" + deep + "}";
  }
  broken(deep, "nested deeper");
}

TEST_CASE("a large configuration is kept whole") {
  const TemporaryFolder folder;
  json meta = small_meta();
  meta["model"]["config_json"] = std::string(300000, 'x');
  const Opened open(folder / "t.h5", meta);
  open.append_all(0, 15);
  REQUIRE(open.commit(0, 15) == KVT_OK);
  REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
  CHECK(TraceReader(folder / "t.h5").info().config_json.size() == 300000);
}

TEST_CASE("damaged descriptions never do harm") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  std::mt19937 random(11);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const std::vector<json> junk = {nullptr,
                                  true,
                                  -1,
                                  0,
                                  1,
                                  2,
                                  7,
                                  2.5,
                                  -0.0,
                                  1e300,
                                  4294967296,
                                  "",
                                  "f16",
                                  "all",
                                  json::array(),
                                  json::object(),
                                  json::array({1, 2, 3}),
                                  json::object({{"name", "x"}}),
                                  std::string("\0", 1),
                                  std::string(5000, 'y')};
  std::vector<json::json_pointer> places;
  const json flat = small_meta().flatten();
  for (const auto& item : flat.items()) {
    places.emplace_back(item.key());
    if (!places.back().parent_pointer().empty()) {
      places.push_back(places.back().parent_pointer());
    }
  }
  const std::string text = small_meta().dump();
  int taken = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = text;
    if (round % 2 == 0) {  // bytes
      for (std::size_t i = below(4) + 1; i > 0 && !damaged.empty(); --i) {
        const std::size_t at = below(damaged.size());
        const auto byte = static_cast<char>(1 + below(255));
        switch (below(3)) {
          case 0:
            damaged[at] = byte;
            break;
          case 1:
            damaged.erase(at, below(20) + 1);
            break;
          default:
            damaged.insert(at, 1, byte);
        }
      }
      // Digits that came together may ask for a terabyte, which is a legal wish.
      const json parsed = json::parse(damaged, nullptr, false);
      if (parsed.is_object() && parsed.contains("capacity") && parsed["capacity"].is_number() &&
          parsed["capacity"].get<double>() > 10000) {
        continue;
      }
    } else {  // values
      json meta = small_meta();
      for (std::size_t i = below(3) + 1; i > 0; --i) {
        try {
          meta[places[below(places.size())]] = junk[below(junk.size())];
        } catch (const json::exception&) {  // its parent is gone
        }
      }
      damaged = meta.dump();
    }
    const std::string sentence = refusal(path, damaged);
    if (sentence.empty()) {
      ++taken;
    } else {
      ++refused;
      INFO(damaged << "\n" << sentence);
      CHECK(sentence.find('\n') == std::string::npos);
      CHECK(sentence.size() < 600);
      CHECK(sentence.find("internal error") == std::string::npos);
    }
    REQUIRE_FALSE(std::filesystem::exists(path.string() + ".part"));
  }
  CHECK(taken > 50);
  CHECK(refused > 1000);
}

TEST_CASE("threads share a handle, and open, write and close their own") {
  const TemporaryFolder folder;
  json meta = small_meta();
  meta["layers"] = {0, 1, 2, 3};
  const Opened open(folder / "shared.h5", meta);
  std::atomic<int> failures{0};
  const auto expect = [&](kvt_status status) {
    if (status != KVT_OK) {
      ++failures;
    }
  };
  std::vector<std::thread> threads;
  for (int layer = 0; layer < 4; ++layer) {
    for (const kvt_kind kind : {KVT_K, KVT_V, KVT_Q, KVT_OUT}) {
      threads.emplace_back([&open, &expect, layer, kind] {
        for (Pos t = 0; t < 40; t += 5) {
          expect(open.append(layer, kind, t, 5, KVT_BF16, Layout::token_major));
        }
      });
    }
  }
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&folder, &expect, &failures, i] {
      for (int round = 0; round < 3; ++round) {
        const std::string path = (folder / (std::to_string(i) + ".h5")).string();
        kvt_trace* trace = nullptr;
        expect(kvt_open(path.c_str(), small_meta().dump().c_str(), &trace));
        for (const int layer : {1, 3}) {
          for (const kvt_kind kind : {KVT_K, KVT_V, KVT_Q, KVT_OUT}) {
            const Memory m = memory(KVT_F16, Layout::head_major, layer, kind, kind == KVT_K || kind == KVT_V ? 2 : 4,
                                    kind == KVT_K || kind == KVT_Q ? 8 : 6, 0, 16);
            expect(kvt_append(trace, layer, kind, 0, 16, &m.rows));
          }
        }
        const std::vector<std::int32_t> ids(16, 5);
        expect(kvt_commit(trace, 16, ids.data(), nullptr));
        // Each thread has its own last error.
        if (kvt_append(trace, i + 10, KVT_K, 0, 1, nullptr) != KVT_USAGE) {
          ++failures;
        }
        const kvt_rows none{KVT_F32, nullptr, 0, 0, 0, nullptr};
        if (kvt_append(trace, i + 10, KVT_K, 0, 1, &none) != KVT_USAGE ||
            std::string(kvt_last_error()).find(fmt::format("layer {} ", i + 10)) != 0) {
          ++failures;
        }
        expect(kvt_close(trace, 1));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(failures == 0);
  REQUIRE(open.commit(0, 40) == KVT_OK);
  REQUIRE(kvt_close(open.trace, 1) == KVT_OK);
  const TraceReader trace(folder / "shared.h5");
  for (int layer = 0; layer < 4; ++layer) {
    check_rows(trace, layer, 40);
  }
  check_rows(TraceReader(folder / "2.h5"), 1, 16);
}

TEST_CASE("a handle that is closed under a waiting thread is refused") {
  const TemporaryFolder folder;
  for (int round = 0; round < 20; ++round) {
    const Opened open(folder / "t.h5", small_meta());
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&open, &wrong] {
        for (Pos t = 0; t < 40; ++t) {
          const kvt_status status = open.append(1, KVT_K, t, 1);
          wrong += status != KVT_OK && status != KVT_USAGE ? 1 : 0;
        }
      });
    }
    threads.emplace_back([&open, &wrong] { wrong += kvt_close(open.trace, 0) != KVT_OK ? 1 : 0; });
    for (std::thread& thread : threads) {
      thread.join();
    }
    CHECK(wrong == 0);
    CHECK_FALSE(std::filesystem::exists((folder / "t.h5").string() + ".part"));
  }
}

}  // namespace kvreplay
