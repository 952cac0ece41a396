// TurboQuant: after a random rotation every coordinate of a unit vector is nearly normal, so one table of levels fits
// all; a sketch of what is left over in signs makes inner products unbiased.
#include <memory>
#include <numeric>
#include <utility>

#include "policies/part.hpp"
#include "policies/rewrite/encoding.hpp"
#include "policies/rewrite/lloyd_max.hpp"
#include "policies/rewrite/quantise.hpp"
#include "policies/rewrite/random_rotation.hpp"

namespace kvreplay {
namespace {

enum class Rotate { gaussian, hadamard };
constexpr std::string_view kRotates[] = {"gaussian", "hadamard"};
enum class Version { mse, inner_product };
constexpr std::string_view kVersions[] = {"mse", "inner_product"};
constexpr int kMostBits = 5;
constexpr auto kToHalf = [](double x) { return to_half(x); };

// Levels for standard normal numbers: 2^bits of them.
const std::vector<double>& normal_levels(int bits) {
  static const auto tables = [] {
    std::array<std::vector<double>, kMostBits + 1> t;
    for (int b = 0; b <= kMostBits; ++b) {
      t[static_cast<std::size_t>(b)] = lloyd_max([](double x) { return std::exp(-x * x / 2); }, -8, 8, 1 << b);
    }
    return t;
  }();
  return tables[static_cast<std::size_t>(bits)];
}

// Relative mean square error of these levels. Levels are means of what they stand for, so that this is 1 - E[level^2].
double normal_error(int bits) {
  const std::vector<double>& level = normal_levels(bits);
  double power = 0, below = 0;
  for (std::size_t i = 0; i < level.size(); ++i) {
    const double edge = i + 1 < level.size() ? (level[i] + level[i + 1]) / 2 : 40;
    const double upto = std::erfc(-edge / std::numbers::sqrt2) / 2;
    power += level[i] * level[i] * (upto - below);
    below = upto;
  }
  return 1 - power;
}

// The codec of vectors of one size.
class Codec {
 public:
  struct Settings {
    int dim, bits;
    bool sketch, rescale;
    Rotate rotate;
    std::uint64_t seed;
  };
  explicit Codec(const Settings& s)
      : s_(s),
        rotation_(s.rotate == Rotate::gaussian ? random_rotation(s.dim, s.seed) : random_hadamard(s.dim, s.seed)),
        levels_(normal_levels(level_bits())),
        norm_(std::sqrt(static_cast<double>(s.dim))) {
    if (s.sketch) {
      sketch_ = gaussian_matrix(s.dim, s.seed, 1);
    }
    if (s.rescale && level_bits() > 0) {
      gain_ = 1 / (1 - normal_error(level_bits()));
    }
  }

  // Rows are vectors: (n, dim). In double, so that nothing but the numbers decides what is nearest.
  MatD decoded(MatD x) const {
    MatD out = MatD::Zero(x.rows(), x.cols());
    if (level_bits() > 0) {
      const Eigen::ArrayXd norms = x.rowwise().norm();
      MatD y = x.array().colwise() * (norms > 0).select(norm_ / norms, 0.0);
      y *= rotation_.transpose();
      y = y.unaryExpr([this](double c) { return levels_[static_cast<std::size_t>(nearest_level(levels_, c))]; });
      out = (y * rotation_).array().colwise() * (norms.unaryExpr(kToHalf) * (gain_ / norm_));
    }
    if (s_.sketch) {
      x -= out;
      const Eigen::ArrayXd norms = x.rowwise().norm();
      const MatD signs = (x * sketch_.transpose()).unaryExpr([](double c) { return c < 0 ? -1.0 : 1.0; });
      const double factor = std::sqrt(std::numbers::pi / 2) / s_.dim;
      out.array() += (signs * sketch_).array().colwise() * (norms.unaryExpr(kToHalf) * factor);
    }
    return out;
  }
  int dim() const { return s_.dim; }
  double bytes() const { return s_.dim * s_.bits / 8.0 + (level_bits() > 0 ? 2 : 0) + (s_.sketch ? 2 : 0); }

 private:
  int level_bits() const { return s_.bits - (s_.sketch ? 1 : 0); }

  Settings s_;
  MatD rotation_, sketch_;      // (dim, dim)
  std::vector<double> levels_;  // of coordinates times sqrt(dim)
  double norm_, gain_ = 1;
};

class TurboQuant final : public Rewriter {
 public:
  struct Config {
    int bits = 3;
    double outliers = 0.25;
    Version keys = Version::mse;
    bool rescale = false;
    Rotate rotation = Rotate::gaussian;
    int residual = 0;
    What what = What::both;
  };
  static constexpr std::string_view kName = "turboquant";
  static constexpr std::string_view kSummary =
      "each vector's norm, and its coordinates after a random rotation on the best levels for normal numbers";
  static constexpr std::string_view kPaper = "arXiv:2504.19874";
  static constexpr std::string_view kDeviation =
      "the paper's 3.5 bits are the default and its 2.5 bits are bits=2 (a quarter of the channels in one bit more, "
      "which makes 3.25 and 2.25 and is only called 3.5 and 2.5); outliers=0 is the plain method; how it picks outlier "
      "channels is not said: here by the mean square over the tokens that are encoded first, each part with a rotation "
      "and a norm of its own; a sketch's estimate is linear in the query, so it is stored as a key";
  static constexpr std::array kParams{
      number<&Config::bits>("bits", 1, 4, "bits of a coordinate"),
      number<&Config::outliers>("outliers", 0, 1, "share of the channels, the largest ones, that get one bit more"),
      choice<&Config::keys>("keys", kVersions,
                            "inner_product: the last bit of a key's coordinates is the sign of a Gaussian sketch of "
                            "the rest, which makes logits unbiased; values are always mse"),
      flag<&Config::rescale>("rescale",
                             "levels are stretched by 1 / (1 - relative error), as mse shrinks inner products by "
                             "that on average; no part of the paper"),
      choice<&Config::rotation>("rotation", kRotates,
                                "gaussian: Q of a Gaussian matrix; hadamard: random signs and a Hadamard transform, in "
                                "blocks of a power of two"),
      number<&Config::residual>("residual", 0, 65536, "latest tokens that stay exact", Scale::lin),
      choice<&Config::what>("what", kWhats, kWhatDoc),
  };

  TurboQuant(const Config& config, const SetShape& shape)
      : config_(config),
        seed_(shape.seed),
        keys_(static_cast<std::size_t>(shape.n_lanes)),
        values_(static_cast<std::size_t>(shape.n_lanes)),
        key_codecs_(make_codecs(shape.head_dim, config.keys == Version::inner_product)),
        value_codecs_(make_codecs(shape.v_head_dim, false)),
        bytes_(slot_bytes(config.what, bytes_of(key_codecs_), bytes_of(value_codecs_), shape)) {}

  void step(Cache& cache) override {
    const int begin = encoded_.slot(cache), end = static_cast<int>(cache.pos.size()) - config_.residual;
    if (begin >= end) {
      return;
    }
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      MatF k = keys_of(cache, lane, begin, end), v = values_of(cache, lane, begin, end);
      if (has_keys(config_.what)) {
        encode(k, key_codecs_, keys_[static_cast<std::size_t>(lane)]);
      }
      if (has_values(config_.what)) {
        encode(v, value_codecs_, values_[static_cast<std::size_t>(lane)]);
      }
      store_slots(cache, lane, begin, k, v, bytes_);
    }
    encoded_.advance(cache, end);
  }

 private:
  // Plain channels, then outliers; a part without channels has no codec.
  using Codecs = std::array<std::unique_ptr<const Codec>, 2>;
  using Parts = std::array<std::vector<int>, 2>;  // the channels of each

  Codecs make_codecs(int dim, bool sketch) const {
    const int n_outliers = static_cast<int>(std::lround(config_.outliers * dim));
    Codecs codecs;
    for (const bool outliers : {false, true}) {
      if (const int n = outliers ? n_outliers : dim - n_outliers; n > 0) {
        codecs[outliers] = std::make_unique<Codec>(
            Codec::Settings{n, config_.bits + (outliers ? 1 : 0), sketch, config_.rescale, config_.rotation, seed_});
      }
    }
    return codecs;
  }
  static double bytes_of(const Codecs& codecs) {
    double bytes = 0;
    for (const auto& codec : codecs) {
      bytes += codec ? codec->bytes() : 0;
    }
    return bytes;
  }

  // The channels of largest mean square are the outliers from now on.
  static void choose(const MatF& x, const Codecs& codecs, Parts& parts) {
    std::vector<int> order(static_cast<std::size_t>(x.cols()));
    std::iota(order.begin(), order.end(), 0);
    const Eigen::VectorXd power = x.cast<double>().colwise().squaredNorm();
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return power[a] < power[b]; });
    const auto n_plain = codecs[0] ? static_cast<std::ptrdiff_t>(order.size()) - (codecs[1] ? codecs[1]->dim() : 0) : 0;
    parts[0].assign(order.begin(), order.begin() + n_plain);
    parts[1].assign(order.begin() + n_plain, order.end());
    for (auto& channels : parts) {
      std::sort(channels.begin(), channels.end());
    }
  }

  static void encode(MatF& x, const Codecs& codecs, Parts& parts) {
    if (parts[0].empty() && parts[1].empty()) {
      choose(x, codecs, parts);
    }
    for (std::size_t p = 0; p < parts.size(); ++p) {
      if (codecs[p]) {
        const MatF part = x(Eigen::all, parts[p]);
        x(Eigen::all, parts[p]) = codecs[p]->decoded(part.cast<double>()).cast<float>();
      }
    }
  }

  Config config_;
  std::uint64_t seed_;
  std::vector<Parts> keys_, values_;  // per lane
  Codecs key_codecs_, value_codecs_;
  double bytes_;  // of a slot
  Frontier encoded_;
};

}  // namespace

extern const PartInfo turboquant;
constinit const PartInfo turboquant = describe<TurboQuant>();

}  // namespace kvreplay
