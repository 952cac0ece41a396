// KIVI: keys in few bits per channel and group of tokens, values in few bits per token and group of
// channels, both between minimum and maximum; the latest tokens stay exact.
#include "policies/part.hpp"
#include "policies/rewrite/encoding.hpp"
#include "policies/rewrite/quantise.hpp"

namespace kvreplay {
namespace {

class Kivi final : public Rewriter {
 public:
  struct Config {
    int bits = 2;
    int group = 32;
    int residual = 128;
    bool fp16_constants = true;
    What what = What::both;
    int debias = 0;
  };
  static constexpr std::string_view kName = "kivi";
  static constexpr std::string_view kSummary = "keys quantised per channel, values per token, the latest tokens exact";
  static constexpr std::string_view kPaper = "arXiv:2402.02750";
  static constexpr std::string_view kDeviation =
      "group and residual are those of the paper's LongBench runs; the code's own default is group=128, its example "
      "residual=32; under eviction a group holds the next resident tokens, and keeps its constants when some of them "
      "leave; a pinned prompt stays exact; debias is no part of the paper";
  static constexpr std::array kParams{
      number<&Config::bits>("bits", 1, 16, "bits of a number"),
      number<&Config::group>("group", 1, 4096, "numbers that share a scale and a zero", Scale::log),
      number<&Config::residual>(
          "residual", 1, 65536,
          "latest tokens: values of all are exact, keys until so many have gathered; a smaller budget "
          "leaves all exact",
          Scale::log),
      flag<&Config::fp16_constants>("fp16_constants", "scale and zero are rounded to half precision before use"),
      choice<&Config::what>("what", kWhats, kWhatDoc),
      number<&Config::debias>("debias", 0, 4096,
                              "logits of encoded keys lose what uniform rounding noise adds to ln E[exp(logit)], as a "
                              "mean over so many last queries at the time of encoding (the exact amount would differ "
                              "by query); 0: nothing"),
  };
  static Needs needs(const Config& c) {
    Needs n;
    n.prompt_queries = has_keys(c.what) ? c.debias : 0;
    return n;
  }
  static void check(const Config& c, int) {
    if (c.residual % c.group != 0) {
      throw ConfigError("kivi: residual=" + std::to_string(c.residual) + " is not a multiple of group=" +
                        std::to_string(c.group) + ", and keys are encoded in whole groups");
    }
  }

  Kivi(const Config& config, const SetShape& shape)
      : config_(config), quantiser_{config.bits, false, config.fp16_constants}, element_bytes_(shape.element_bytes) {}

  void step(Cache& cache) override {
    const int n = static_cast<int>(cache.pos.size());
    if (has_keys(config_.what)) {
      const int begin = keys_.slot(cache), end = end_of_batches(begin, n, config_.residual);
      for (int first = begin; first < end; first += config_.group) {
        for (int lane = 0; lane < cache.n_lanes; ++lane) {
          encode_keys(cache, lane, first);
        }
      }
      keys_.advance(cache, end);
    }
    if (has_values(config_.what)) {
      const int end = n - config_.residual;
      for (int i = values_.slot(cache); i < end; ++i) {
        for (int lane = 0; lane < cache.n_lanes; ++lane) {
          encode_value(cache, lane, i);
        }
      }
      values_.advance(cache, end);
    }
  }

 private:
  void encode_keys(Cache& cache, int lane, int first) {
    MatF k = keys_of(cache, lane, first, first + config_.group);
    Eigen::ArrayXf steps(k.cols());
    for (Eigen::Index c = 0; c < k.cols(); ++c) {
      Eigen::VectorXf channel = k.col(c);
      steps[c] = quantiser_.step(channel);
      quantiser_.apply(channel);
      k.col(c) = channel;
    }
    const double bytes = quantiser_.bytes(cache.head_dim, static_cast<double>(cache.head_dim) / config_.group) +
                         (config_.debias > 0 ? 2.0 / config_.group : 0);  // one bias for the group
    const float bias = config_.debias > 0 ? -noise_bias(cache.queries(lane, config_.debias), steps) : 0;
    for (int i = 0; i < config_.group; ++i) {
      const int slot = first + i;
      store(cache, lane, slot, k.row(i), cache.value(lane, slot), cache.bias(lane, slot) + bias,
            bytes - static_cast<double>(cache.head_dim) * element_bytes_);
    }
  }

  void encode_value(Cache& cache, int lane, int slot) {
    Eigen::VectorXf v = cache.value(lane, slot);
    quantiser_.apply(v, config_.group);
    const double n = static_cast<double>(v.size());
    store(cache, lane, slot, cache.key(lane, slot), v, cache.bias(lane, slot),
          quantiser_.bytes(n, std::ceil(n / config_.group)) - n * element_bytes_);
  }

  static void store(Cache& cache, int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v, float bias,
                    double more_bytes) {
    cache.rewrite(lane, slot, k, v, bias, cache.bytes(lane, slot) + more_bytes);
  }

  Config config_;
  Quantiser quantiser_;
  int element_bytes_;
  Frontier keys_, values_;
};

}  // namespace

extern const PartInfo kivi;
constinit const PartInfo kivi = describe<Kivi>();

}  // namespace kvreplay
