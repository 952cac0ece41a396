#include <catch2/catch.hpp>
#include <cmath>

#include "tests/traces/fixtures.hpp"
#include "traces/hash.hpp"
#include "traces/hdf5.hpp"
#include "traces/import.hpp"
#include "traces/info.hpp"
#include "traces/synth.hpp"
#include "traces/verify.hpp"

namespace kvreplay::test {
namespace {

SynthOptions small_synth() {
  SynthOptions options;
  options.n_tokens = 300;
  options.prompt_len = 200;
  options.head_dim = 32;
  options.n_heads = 6;
  options.n_kv_heads = 3;
  options.n_layers = 1;
  options.element = ElementType::f32;
  return options;
}

// Softmax weights of one query over tokens [0, pos].
std::vector<double> attention(const TraceReader& trace, int layer, int head, Pos pos) {
  const auto d = static_cast<std::size_t>(trace.info().head_dim);
  std::vector<float> q(d), k(static_cast<std::size_t>(pos + 1) * d);
  trace.read_q(layer, head, pos, pos + 1, q);
  trace.read_k(layer, head / trace.info().group_size, 0, pos + 1, k);
  std::vector<double> weights;
  double total = 0;
  for (std::size_t token = 0; token <= static_cast<std::size_t>(pos); ++token) {
    double dot = 0;
    for (std::size_t i = 0; i < d; ++i) {
      dot += static_cast<double>(q[i]) * static_cast<double>(k[token * d + i]);
    }
    weights.push_back(std::exp(dot * trace.info().attention_scale));
    total += weights.back();
  }
  for (double& weight : weights) {
    weight /= total;
  }
  return weights;
}

// A trace whose stored outputs are right for `scale`, while it declares `declared`.
void write_with_outputs(const std::filesystem::path& path, ElementType element, double scale, double declared,
                        int window, double softcap) {
  TraceInfo meta = small_meta({}, element);
  meta.attention_scale = declared;
  meta.sliding_window = {0, window, 0, window};
  meta.logit_softcap = softcap;
  WriterOptions options;
  options.queries = queries_all(40);
  options.outputs = {0, 20, 39};
  options.out_type = element;
  TraceWriter writer(path, meta, 40, options);
  append_small(writer, meta, options.queries, 0, 40);
  for (const int layer : meta.layers) {
    for (const Pos pos : options.outputs) {
      std::vector<float> out;  // (n_heads, v_head_dim)
      for (int head = 0; head < meta.n_heads; ++head) {
        std::vector<double> sum(6, 0.0);
        double total = 0;
        for (Pos token = window > 0 ? std::max(0, pos - window + 1) : 0; token <= pos; ++token) {
          double dot = 0;
          for (int i = 0; i < 8; ++i) {
            dot += static_cast<double>(value_at(layer, 'q', head, pos, i)) *
                   static_cast<double>(value_at(layer, 'k', head / 2, token, i));
          }
          dot *= scale;
          const double weight = std::exp(softcap > 0 ? softcap * std::tanh(dot / softcap) : dot);
          total += weight;
          for (int i = 0; i < 6; ++i) {
            sum[static_cast<std::size_t>(i)] += weight * static_cast<double>(value_at(layer, 'v', head / 2, token, i));
          }
        }
        for (const double x : sum) {
          out.push_back(static_cast<float>(x / total));
        }
      }
      writer.write_output(layer, pos, out);
    }
  }
  writer.close();
}

}  // namespace

TEST_CASE("stored outputs prove scale, window and soft-cap, and refute wrong ones") {
  const TemporaryFolder folder;
  for (const ElementType element : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
    for (const int window : {0, 9}) {
      for (const double softcap : {0.0, 3.0}) {
        write_with_outputs(folder / "a.h5", element, 0.02, 0.02, window, softcap);
        const VerifyReport report = verify(TraceReader(folder / "a.h5"));
        CHECK(report.failures == std::vector<std::string>{});
        REQUIRE(report.outputs.size() == 2);
        CHECK(report.outputs[0].n == 12);
        CHECK(report.outputs[0].tolerance == (element == ElementType::f16    ? 2e-3
                                              : element == ElementType::bf16 ? 1.5e-2
                                                                             : 1e-5));
        write_with_outputs(folder / "a.h5", element, 0.02, 0.03, window, softcap);
        const VerifyReport wrong = verify(TraceReader(folder / "a.h5"));
        REQUIRE(wrong.failures.size() == 2);
        CHECK_THAT(wrong.failures[0], Catch::Contains("/layers/001/out"));
      }
    }
  }
}

TEST_CASE("without outputs the keys tell the right rotation from wrong ones") {
  const TemporaryFolder folder;
  for (const char* style : {"half", "interleaved"}) {
    SynthOptions options = small_synth();
    options.style = style;
    synthesize(folder / "a.h5", options);
    const VerifyReport right = verify(TraceReader(folder / "a.h5"));
    CHECK(right.failures.empty());
    REQUIRE(right.evidence.size() == 1);
    CHECK(right.evidence[0].pairing == "supports");
    CHECK(right.evidence[0].frequencies == "supports");
    hdf5::File file = hdf5::File::open_write(folder / "a.h5");
    const hdf5::Group rope = file.root().group("model").group("rope");
    const std::vector<double> inv_freq = rope.reals("inv_freq");
    SECTION(std::string("the other pairing, ") + style) {
      rope.set("style", std::string(style) == "half" ? "interleaved" : "half");
      file.close();
      const VerifyReport wrong = verify(TraceReader(folder / "a.h5"));
      CHECK(wrong.evidence[0].pairing == "contradicts");
      CHECK_FALSE(wrong.failures.empty());  // the content hash covers the rotation
    }
    SECTION(std::string("other frequencies, ") + style) {
      std::vector<double> other = inv_freq;
      for (double& f : other) {
        f /= 1.1;
      }
      rope.set("inv_freq", std::span<const double>(other));
      file.close();
      CHECK(verify(TraceReader(folder / "a.h5")).evidence[0].frequencies == "contradicts");
    }
  }
}

TEST_CASE("a seed gives the same content everywhere, another seed another") {
  const TemporaryFolder folder;
  synthesize(folder / "a.h5", small_synth());
  // Fixed here once: another machine, compiler or flag must not change a byte.
  CHECK(TraceReader(folder / "a.h5").info().content_hash ==
        "sha256:d6f46cdaafd6bd6dbbf308b024a052a102796c9472a66e848162e6cb0df07bc6");
  SynthOptions other = small_synth();
  other.seed = 2;
  synthesize(folder / "b.h5", other);
  CHECK(TraceReader(folder / "b.h5").info().content_hash != TraceReader(folder / "a.h5").info().content_hash);
}

TEST_CASE("synthetic heads have sinks, a local kind and a retrieving kind") {
  const TemporaryFolder folder;
  SynthOptions options = small_synth();
  options.head_dim = 64;
  synthesize(folder / "a.h5", options);
  const TraceReader trace(folder / "a.h5");
  double sink = 0, near_local = 0, near_retrieval = 0;
  for (Pos pos = 280; pos < 300; ++pos) {
    for (int head = 0; head < 4; ++head) {  // KV head 0 is local, KV head 1 retrieves
      const std::vector<double> weights = attention(trace, 0, head, pos);
      for (std::size_t token = 0; token < weights.size(); ++token) {
        sink += token < 4 ? weights[token] / 80 : 0;
        (head < 2 ? near_local : near_retrieval) +=
            token >= 4 && static_cast<Pos>(token) > pos - 16 ? weights[token] / 40 : 0;
      }
    }
  }
  CHECK(sink > 0.1);  // 4 of 290 tokens
  CHECK(near_local > 2 * near_retrieval);
  CHECK(near_local > 0.15);  // 16 of 290 tokens hold 5 % by chance
}

TEST_CASE("synth and the query sets refuse what cannot be") {
  const TemporaryFolder folder;
  SynthOptions options = small_synth();
  options.head_dim = 33;
  CHECK_THROWS_WITH(synthesize(folder / "a.h5", options), Catch::Contains("head_dim 33 must be even"));
  options = small_synth();
  options.queries = "some";
  CHECK_THROWS_WITH(synthesize(folder / "a.h5", options),
                    "queries 'some' is unknown; allowed are all, decode and window:N");
  CHECK(parse_queries("window:5", 10, 20) == queries_window(5, 10, 20));
  CHECK(parse_queries("decode", 10, 12) == std::vector<Pos>{10, 11});
  CHECK(parse_queries("window:99", 2, 3) == std::vector<Pos>{0, 1, 2});
  for (const char* queries : {"all", "decode", "window:7"}) {
    options.queries = queries;
    synthesize(folder / "a.h5", options);
    CHECK(TraceReader(folder / "a.h5").q_index(0).size() == parse_queries(queries, 200, 300).size());
  }
}

TEST_CASE("info names what a user asks for") {
  const TemporaryFolder folder;
  write_small(folder / "a.h5", {.queries = queries_decode(15, 40), .extras = true});
  const TraceReader trace(folder / "a.h5");
  CHECK_THAT(info_text(trace), Catch::Contains("4 query, 2 KV (group_size 2), head_dim 8, v_head_dim 6") &&
                                   Catch::Contains("40 (15 prompt, 25 decode)") && Catch::Contains("from token 15") &&
                                   Catch::Contains("needle [3, 6)"));
  CHECK_THAT(info_json(trace), Catch::Contains("\"prompt_len\": 15") && Catch::Contains("\"n_steps\": 25") &&
                                   Catch::Contains(trace.info().content_hash));
}

}  // namespace kvreplay::test
