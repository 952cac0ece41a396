// TaDA: per token the mean over a layer's KV heads is kept, and of each head only its deviation from the mean, in few
// bits.
#include "policies/part.hpp"
#include "policies/rewrite/encoding.hpp"
#include "policies/rewrite/quantise.hpp"

namespace kvreplay {
namespace {

enum class Centre { heads, tokens, none };
constexpr auto kToHalf = [](double x) { return to_half(x); };
constexpr std::string_view kCentres[] = {"heads", "tokens", "none"};

class Tada final : public Rewriter {
 public:
  struct Config {
    int bits = 4;
    int group = 128;
    int residual = 128;
    bool symmetric = false;
    Centre centre = Centre::heads;
    What what = What::both;
  };
  static constexpr std::string_view kName = "tada";
  static constexpr std::string_view kSummary =
      "per token the mean over KV heads in half precision, and each head's deviation from it in few bits";
  static constexpr std::string_view kPaper = "arXiv:2506.04642";
  static constexpr std::string_view kDeviation =
      "the paper chooses 2, 4 or 8 bits for each layer by a random search: write bits=@FILE; the length of its exact "
      "window and whether its quantiser has a zero (symmetric) are not known; the mean is divided by the number of "
      "heads, which the formula as noted leaves out; centre=tokens and centre=none are no part of the paper";
  static constexpr bool kAcrossHeads = true;
  static constexpr std::array kParams{
      number<&Config::bits>("bits", 1, 16, "bits of a deviation"),
      number<&Config::group>("group", 1, 4096, "channels that share a scale and a zero", Scale::log),
      number<&Config::residual>(
          "residual", 1, 65536,
          "latest tokens that stay exact until so many have gathered and are encoded together; a smaller "
          "budget leaves all exact",
          Scale::log),
      flag<&Config::symmetric>("symmetric", "deviations have a scale alone, and levels about zero"),
      choice<&Config::centre>(
          "centre", kCentres,
          "deviation from what; tokens: from each head's mean over the tokens encoded together; none: plain "
          "quantising, to compare with"),
      choice<&Config::what>("what", kWhats, kWhatDoc),
  };

  Tada(const Config& config, const SetShape& shape)
      : config_(config),
        quantiser_{config.bits, config.symmetric, true},
        bytes_(slot_bytes(config.what, bytes(shape.head_dim, shape.n_lanes), bytes(shape.v_head_dim, shape.n_lanes),
                          shape)) {}

  void step(Cache& cache) override {
    const int begin = encoded_.slot(cache);
    const int end = end_of_batches(begin, static_cast<int>(cache.pos.size()), config_.residual);
    for (int first = begin; first < end; first += config_.residual) {
      std::vector<MatF> k, v;  // per lane
      for (int lane = 0; lane < cache.n_lanes; ++lane) {
        k.push_back(keys_of(cache, lane, first, first + config_.residual));
        v.push_back(values_of(cache, lane, first, first + config_.residual));
      }
      if (has_keys(config_.what)) {
        encode(k);
      }
      if (has_values(config_.what)) {
        encode(v);
      }
      for (int lane = 0; lane < cache.n_lanes; ++lane) {
        const auto i = static_cast<std::size_t>(lane);
        store_slots(cache, lane, first, k[i], v[i], bytes_);
      }
    }
    encoded_.advance(cache, end);
  }

 private:
  // Of one head's vector, with its share of the mean.
  double bytes(int dim, int n_heads) const {
    const double mean = config_.centre == Centre::heads    ? 2.0 * dim / n_heads
                        : config_.centre == Centre::tokens ? 2.0 * dim / config_.residual
                                                           : 0;
    const int n_groups = (dim + config_.group - 1) / config_.group;
    return mean + quantiser_.bytes(dim, n_groups);
  }

  void encode(std::vector<MatF>& lanes) const {
    MatD mean = MatD::Zero(lanes[0].rows(), lanes[0].cols());
    if (config_.centre == Centre::heads) {
      for (const MatF& x : lanes) {
        mean += x.cast<double>();
      }
      mean = (mean / static_cast<double>(lanes.size())).unaryExpr(kToHalf).eval();
    }
    for (MatF& x : lanes) {
      if (config_.centre == Centre::tokens) {
        mean.rowwise() = x.cast<double>().colwise().mean().unaryExpr(kToHalf).eval();
      }
      for (Eigen::Index r = 0; r < x.rows(); ++r) {
        Eigen::VectorXf deviation = (mean.row(r) - x.row(r).cast<double>()).cast<float>();
        quantiser_.apply(deviation, config_.group);
        x.row(r) = (mean.row(r) - deviation.transpose().cast<double>()).cast<float>();
      }
    }
  }

  Config config_;
  Quantiser quantiser_;
  double bytes_;  // of a slot's part in one KV head
  Frontier encoded_;
};

}  // namespace

extern const PartInfo tada;
constinit const PartInfo tada = describe<Tada>();

}  // namespace kvreplay
