// SALS, storing: keys of all KV heads as one short vector before RoPE, from which they are rebuilt, and values in few
// bits; the latest tokens stay exact.
#include <numeric>

#include "policies/part.hpp"
#include "policies/rewrite/encoding.hpp"
#include "policies/rewrite/quantise.hpp"
#include "policies/sals.hpp"

namespace kvreplay {
namespace {

enum class Axis { channels, tokens };
constexpr std::string_view kAxes[] = {"channels", "tokens"};

class SalsStore final : public Rewriter {
 public:
  struct Config {
    double rank = 0.25;
    int bits = 4;
    int group = 32;
    Axis along = Axis::channels;
    int residual = 64;
    int dense_first = 2;
    int dense_last = 1;
    What what = What::both;
  };
  static constexpr std::string_view kName = "sals_store";
  static constexpr std::string_view kSummary =
      "keys as a joint latent of all KV heads before RoPE, rebuilt and turned to their positions; values in few bits";
  static constexpr std::string_view kPaper = "arXiv:2510.24273";
  static constexpr std::string_view kDeviation =
      "directions as in sals_score; the 12.5% setting is rank=0.125,bits=2; 32 values share a scale and a zero, which "
      "the published compression ratios fit, along a token's channels or (along=tokens) a channel's tokens; the paper "
      "keeps the latest tokens at a higher precision that is not known: here exact; the latent itself is not rounded";
  static constexpr bool kAcrossHeads = true;
  static constexpr std::array kParams{
      number<&Config::rank>("rank", 0, 1, "numbers of a token's latent, as a share of n_kv_heads * head_dim"),
      number<&Config::bits>("bits", 1, 16, "bits of a number of a value"),
      number<&Config::group>("group", 1, 4096, "numbers of a value that share a scale and a zero", Scale::log),
      choice<&Config::along>("along", kAxes, "whether the numbers that share are neighbours as channels or as tokens"),
      number<&Config::residual>("residual", 0, 65536, "latest tokens that stay exact"),
      number<&Config::dense_first>("dense_first", 0, 4096, "first layers of the model, stored as they are"),
      number<&Config::dense_last>("dense_last", 0, 4096, "last layers of the model, stored as they are"),
      choice<&Config::what>("what", kWhats, kWhatDoc),
  };
  static Needs needs(const Config&) {
    Needs n;
    n.pre_rope = true;
    return n;
  }

  SalsStore(const Config& config, const SetShape& shape)
      : config_(config),
        shape_(shape),
        quantiser_{config.bits},
        dense_(is_dense_layer(shape, config.dense_first, config.dense_last)),
        rotation_(shape.rotation) {}

  void step(Cache& cache) override {
    const int n = static_cast<int>(cache.pos.size()), begin = encoded_.slot(cache);
    int end = std::max(begin, n - config_.residual);
    if (config_.along == Axis::tokens && has_values(config_.what)) {
      end = end_of_batches(begin, end, config_.group);
    }
    // A pinned prompt has no slots: what comes first is all there is to learn from.
    if (dense_ || n == 0 || (!cache.at_prefill() && end <= begin)) {
      return;
    }
    if (basis_.size() == 0) {
      std::vector<int> all(static_cast<std::size_t>(n));
      std::iota(all.begin(), all.end(), 0);
      basis_ =
          leading_directions(joint_keys(cache, all, rotation_), rank_of(config_.rank, cache.n_lanes * cache.head_dim));
    }
    if (end > begin) {
      encode(cache, begin, end);
      encoded_.advance(cache, end);
    }
  }

 private:
  void encode(Cache& cache, int begin, int end) {
    MatF rebuilt;  // (slots, n_lanes * head_dim)
    if (has_keys(config_.what)) {
      std::vector<int> slots(static_cast<std::size_t>(end - begin));
      std::iota(slots.begin(), slots.end(), begin);
      const MatF latent = joint_keys(cache, slots, rotation_) * basis_;
      rebuilt = latent * basis_.transpose();
    }
    const double numbers = static_cast<double>(basis_.cols()) / cache.n_lanes, dim = cache.v_head_dim;
    const double groups = config_.along == Axis::tokens ? dim / config_.group : std::ceil(dim / config_.group);
    const double bytes =
        slot_bytes(config_.what, numbers * shape_.element_bytes, quantiser_.bytes(dim, groups), shape_);
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      MatF k = keys_of(cache, lane, begin, end), v = values_of(cache, lane, begin, end);
      if (has_keys(config_.what)) {
        k = rebuilt.middleCols(lane * cache.head_dim, cache.head_dim);
        for (int i = 0; i < end - begin; ++i) {
          rotation_->apply(cache.pos[static_cast<std::size_t>(begin + i)],
                           {k.row(i).data(), static_cast<std::size_t>(cache.head_dim)});
        }
      }
      if (has_values(config_.what)) {
        quantise(v);
      }
      store_slots(cache, lane, begin, k, v, bytes);
    }
  }

  void quantise(MatF& v) const {
    if (config_.along == Axis::channels) {
      for (Eigen::Index r = 0; r < v.rows(); ++r) {
        Eigen::VectorXf token = v.row(r);
        quantiser_.apply(token, config_.group);
        v.row(r) = token;
      }
    } else {
      for (Eigen::Index c = 0; c < v.cols(); ++c) {
        Eigen::VectorXf channel = v.col(c);
        quantiser_.apply(channel, config_.group);
        v.col(c) = channel;
      }
    }
  }

  Config config_;
  SetShape shape_;
  Quantiser quantiser_;
  bool dense_;
  const Rotation* rotation_;  // of the trace
  MatF basis_;                // (n_lanes * head_dim, at most rank)
  Frontier encoded_;
};

}  // namespace

extern const PartInfo sals_store;
constinit const PartInfo sals_store = describe<SalsStore>();

}  // namespace kvreplay
