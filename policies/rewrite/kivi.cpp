// KIVI: keys in few bits per channel and group of tokens, values in few bits per token and group of
// channels, both between minimum and maximum; the latest tokens stay exact.
#include "policies/part.hpp"

namespace kvreplay {
namespace {

class Kivi final : public Rewriter {
 public:
  struct Config {
    int bits = 2;
    int group = 32;
    int residual = 128;
    bool fp16_constants = true;
  };
  static constexpr std::string_view kName = "kivi";
  static constexpr std::string_view kSummary = "keys quantised per channel, values per token, the latest tokens exact";
  static constexpr std::string_view kPaper = "arXiv:2402.02750";
  static constexpr std::string_view kDeviation =
      "under eviction a group holds the next resident tokens, and keeps its constants when some of "
      "them leave; a pinned "
      "prompt stays exact";
  static constexpr std::array kParams{
      number<&Config::bits>("bits", 1, 16, "bits of a number"),
      number<&Config::group>("group", 1, 4096, "numbers that share a scale and a zero", Scale::log),
      number<&Config::residual>("residual", 1, 65536,
                                "latest tokens: values of all are exact, keys until so many have gathered", Scale::log),
      flag<&Config::fp16_constants>("fp16_constants", "scale and zero are rounded to half precision before use"),
  };
  static void check(const Config& c, int) {
    if (c.residual % c.group != 0) {
      throw ConfigError("kivi: residual=" + std::to_string(c.residual) + " is not a multiple of group=" +
                        std::to_string(c.group) + ", and keys are encoded in whole groups");
    }
  }

  Kivi(const Config& config, const SetShape& shape) : config_(config), element_bytes_(shape.element_bytes) {}

  void step(Cache& cache) override {
    const int n = static_cast<int>(cache.pos.size());
    int keys = slots_before(cache, keys_until_);
    const int values = slots_before(cache, values_until_), exact_from = n - config_.residual;
    for (; n - keys >= config_.residual; keys += config_.residual) {
      for (int first = keys; first < keys + config_.residual; first += config_.group) {
        for (int lane = 0; lane < cache.n_lanes; ++lane) {
          encode_keys(cache, lane, first);
        }
      }
      keys_until_ = at(cache, keys + config_.residual - 1) + 1;
    }
    for (int i = values; i < exact_from; ++i) {
      for (int lane = 0; lane < cache.n_lanes; ++lane) {
        encode_value(cache, lane, i);
      }
      values_until_ = at(cache, i) + 1;
    }
  }

 private:
  static Pos at(const Cache& cache, int slot) { return cache.pos[static_cast<std::size_t>(slot)]; }
  static int slots_before(const Cache& cache, Pos end) {
    return static_cast<int>(std::lower_bound(cache.pos.begin(), cache.pos.end(), end) - cache.pos.begin());
  }

  void quantise(Eigen::Ref<Eigen::VectorXf> x) const {
    const auto round = [&](float c) { return config_.fp16_constants ? static_cast<float>(Eigen::half(c)) : c; };
    const float levels = static_cast<float>((1 << config_.bits) - 1);
    const float zero = x.minCoeff();
    if (x.maxCoeff() == zero) {
      return;
    }
    const float stored_zero = round(zero), scale = round((x.maxCoeff() - zero) / levels);
    if (!(scale > 0)) {  // below half precision's smallest step
      x.setConstant(stored_zero);
      return;
    }
    x = ((x.array() - stored_zero) / scale).rint().max(0.0F).min(levels) * scale + stored_zero;
  }

  void encode_keys(Cache& cache, int lane, int first) {
    MatF k(config_.group, cache.head_dim);
    for (int i = 0; i < config_.group; ++i) {
      k.row(i) = cache.key(lane, first + i);
    }
    for (Eigen::Index c = 0; c < k.cols(); ++c) {
      Eigen::VectorXf channel = k.col(c);
      quantise(channel);
      k.col(c) = channel;
    }
    const double bytes = encoded_bytes(cache.head_dim, static_cast<double>(cache.head_dim) / config_.group);
    for (int i = 0; i < config_.group; ++i) {
      const int slot = first + i;
      store(cache, lane, slot, k.row(i), cache.value(lane, slot),
            bytes - static_cast<double>(cache.head_dim) * element_bytes_);
    }
  }

  void encode_value(Cache& cache, int lane, int slot) {
    Eigen::VectorXf v = cache.value(lane, slot);
    const Eigen::Index n = v.size(), group = config_.group;
    for (Eigen::Index c = 0; c < n; c += group) {
      quantise(v.segment(c, std::min(group, n - c)));
    }
    const double groups = std::ceil(static_cast<double>(n) / config_.group);
    store(cache, lane, slot, cache.key(lane, slot), v,
          encoded_bytes(static_cast<int>(n), groups) - static_cast<double>(n) * element_bytes_);
  }

  // `constants` pairs of scale and zero at 16 bit each.
  double encoded_bytes(int numbers, double constants) const { return numbers * config_.bits / 8.0 + 4 * constants; }
  static void store(Cache& cache, int lane, int slot, const Eigen::VectorXf& k, const Eigen::VectorXf& v,
                    double more_bytes) {
    cache.rewrite(lane, slot, k, v, cache.bias(lane, slot), cache.bytes(lane, slot) + more_bytes);
  }

  Config config_;
  int element_bytes_;
  Pos keys_until_ = 0,
      values_until_ = 0;  // keys, values of slots before these positions are encoded
};

}  // namespace

extern const PartInfo kivi;
constinit const PartInfo kivi = describe<Kivi>();

}  // namespace kvreplay
