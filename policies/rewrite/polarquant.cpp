// PolarQuant: after a random rotation pairs of coordinates become radii and angles, pairs of radii again, and the
// angles follow known densities; angles are kept in few bits, the last radii in half precision.
#include <numbers>

#include "policies/part.hpp"
#include "policies/rewrite/encoding.hpp"
#include "policies/rewrite/lloyd_max.hpp"
#include "policies/rewrite/quantise.hpp"
#include "policies/rewrite/random_rotation.hpp"

namespace kvreplay {
namespace {

enum class Codebook { gaussian, kmeans };
constexpr std::string_view kCodebooks[] = {"gaussian", "kmeans"};
constexpr double kTurn = 2 * std::numbers::pi;

// One level's angles and their cosines and sines.
struct Angles {
  std::vector<double> angle;
  double period = 0;

  int nearest(double x) const { return nearest_level(angle, x, period); }
  // k-means in one dimension from these angles on. On a circle an angle counts from its centre, the short way round.
  void fit(const std::vector<double>& data, int iterations) {
    for (int n = 0; n < iterations; ++n) {
      std::vector<double> sum(angle.size()), count(angle.size());
      for (double x : data) {
        const auto i = static_cast<std::size_t>(nearest(x));
        const double off = x - angle[i];
        sum[i] += period > 0 ? off - period * std::rint(off / period) : off;
        count[i] += 1;
      }
      std::vector<double> moved = angle;
      for (std::size_t i = 0; i < angle.size(); ++i) {
        if (count[i] > 0) {
          moved[i] += sum[i] / count[i];
          moved[i] -= period > 0 ? period * std::floor(moved[i] / period) : 0;
        }
      }
      std::sort(moved.begin(), moved.end());
      if (moved == angle) {
        return;
      }
      angle = moved;
    }
  }
};

// Level 0 goes once around, evenly. At level l an angle lies between the radii of two times 2^l normal numbers.
Angles gaussian_angles(int level, int bits) {
  if (level == 0) {
    Angles a{{}, kTurn};
    for (int i = 0; i < 1 << bits; ++i) {
      a.angle.push_back(kTurn * (i + 0.5) / (1 << bits));
    }
    return a;
  }
  const int power = (1 << level) - 1;
  return {lloyd_max([power](double x) { return std::pow(std::abs(std::sin(2 * x)), power); }, 0, std::numbers::pi / 2,
                    1 << bits),
          0};
}

class PolarQuant final : public Rewriter {
 public:
  struct Config {
    int levels = 4;
    int first_bits = 4;
    int bits = 2;
    Codebook codebook = Codebook::gaussian;
    int iterations = 20;
    bool rotate = true;
    bool generated = false;
    What what = What::both;
  };
  static constexpr std::string_view kName = "polarquant";
  static constexpr std::string_view kSummary =
      "polar coordinates of polar coordinates after a random rotation, angles in few bits";
  static constexpr std::string_view kPaper = "arXiv:2502.02617";
  static constexpr std::string_view kDeviation =
      "offline codebooks are those of normal numbers (codebook=kmeans fits them to each KV head's own prompt, as the "
      "online variant does; its start and length are not said); as in the paper's LongBench runs the generated tokens "
      "stay exact (generated=true encodes them too); a head_dim with fewer factors of two has fewer levels; codebooks "
      "and the rotation, shared by all tokens, are not counted in bytes";
  static constexpr std::array kParams{
      number<&Config::levels>("levels", 1, 8, "how many times radii are paired"),
      number<&Config::first_bits>("first_bits", 1, 8, "bits of an angle between two coordinates"),
      number<&Config::bits>("bits", 1, 5, "bits of an angle between two radii"),
      choice<&Config::codebook>("codebook", kCodebooks, "where the angles' levels come from"),
      number<&Config::iterations>("iterations", 1, 1000, "of kmeans, from the codebook of normal numbers on",
                                  Scale::log),
      flag<&Config::rotate>("rotate", "a random rotation comes first, the same for keys, values, heads and layers"),
      flag<&Config::generated>("generated", "tokens after the prompt are encoded too"),
      choice<&Config::what>("what", kWhats, kWhatDoc),
  };

  PolarQuant(const Config& config, const SetShape& shape)
      : config_(config),
        key_(make_side(shape.head_dim, shape.seed)),
        value_(make_side(shape.v_head_dim, shape.seed)),
        bytes_(slot_bytes(config.what, key_.bytes, value_.bytes, shape)) {}

  void step(Cache& cache) override {
    const auto last =
        config_.generated ? cache.pos.end() : std::lower_bound(cache.pos.begin(), cache.pos.end(), cache.prompt_len);
    const int end = static_cast<int>(last - cache.pos.begin());
    const int begin = encoded_.slot(cache);
    if (begin >= end) {
      return;
    }
    std::vector<MatF> k, v;  // per lane
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      k.push_back(keys_of(cache, lane, begin, end));
      v.push_back(values_of(cache, lane, begin, end));
    }
    if (has_keys(config_.what)) {
      encode(k, key_);
    }
    if (has_values(config_.what)) {
      encode(v, value_);
    }
    for (int lane = 0; lane < cache.n_lanes; ++lane) {
      const auto i = static_cast<std::size_t>(lane);
      store_slots(cache, lane, begin, k[i], v[i], bytes_);
    }
    encoded_.advance(cache, end);
  }

 private:
  struct Side {     // keys or values
    MatD rotation;  // (dim, dim)
    std::vector<Angles> levels;
    double bytes = 0;
    bool fitted = false;
  };

  Side make_side(int dim, std::uint64_t seed) const {
    Side s;
    s.rotation = config_.rotate ? random_rotation(dim, seed) : MatD(MatD::Identity(dim, dim));
    double bits = 0;
    int n = dim;
    for (int level = 0; level < config_.levels && n % 2 == 0; ++level) {
      n /= 2;
      const int width = level == 0 ? config_.first_bits : config_.bits;
      s.levels.push_back(gaussian_angles(level, width));
      bits += n * width;
    }
    s.bytes = (bits + 16 * n) / 8;
    return s;
  }

  // Pairs of (radii) become (radii / 2), and `see` says what becomes of an angle.
  template <class See>
  static void to_polar(Eigen::Ref<Eigen::RowVectorXd> radii, int n_levels, See see) {
    Eigen::Index n = radii.size();
    for (int level = 0; level < n_levels; ++level) {
      n /= 2;
      for (Eigen::Index j = 0; j < n; ++j) {
        const double x = radii[2 * j], y = radii[2 * j + 1];
        double angle = std::atan2(y, x);
        if (angle < 0) {
          angle += kTurn;
        }
        see(level, j, angle);
        radii[j] = std::hypot(x, y);
      }
    }
  }

  // In double, so that nothing but the numbers decides what is nearest.
  void encode(std::vector<MatF>& lanes, Side& side) const {
    const int n_levels = static_cast<int>(side.levels.size());
    std::vector<MatD> turned;
    for (const MatF& x : lanes) {
      turned.emplace_back(x.cast<double>() * side.rotation);
    }
    if (config_.codebook == Codebook::kmeans && !side.fitted) {
      side.fitted = true;
      std::vector<std::vector<double>> seen(side.levels.size());
      for (MatD x : turned) {
        for (Eigen::Index r = 0; r < x.rows(); ++r) {
          to_polar(x.row(r), n_levels, [&](int level, Eigen::Index, double angle) {
            seen[static_cast<std::size_t>(level)].push_back(angle);
          });
        }
      }
      for (std::size_t level = 0; level < seen.size(); ++level) {
        side.levels[level].fit(seen[level], config_.iterations);
      }
    }
    for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
      MatD& x = turned[lane];
      std::vector<std::vector<int>> code(side.levels.size(), std::vector<int>(static_cast<std::size_t>(x.cols())));
      for (Eigen::Index r = 0; r < x.rows(); ++r) {
        auto radii = x.row(r);
        to_polar(radii, n_levels, [&](int level, Eigen::Index j, double angle) {
          code[static_cast<std::size_t>(level)][static_cast<std::size_t>(j)] =
              side.levels[static_cast<std::size_t>(level)].nearest(angle);
        });
        Eigen::Index n = x.cols() >> n_levels;
        radii.head(n) = radii.head(n).unaryExpr([](double radius) { return to_half(radius); }).eval();
        for (std::size_t level = side.levels.size(); level-- > 0; n *= 2) {
          for (Eigen::Index j = n; j-- > 0;) {
            const double radius = radii[j];
            const double angle =
                side.levels[level].angle[static_cast<std::size_t>(code[level][static_cast<std::size_t>(j)])];
            radii[2 * j] = radius * std::cos(angle);
            radii[2 * j + 1] = radius * std::sin(angle);
          }
        }
      }
      lanes[lane] = (x * side.rotation.transpose()).cast<float>();
    }
  }

  Config config_;
  Side key_, value_;
  double bytes_;  // of a slot
  Frontier encoded_;
};

}  // namespace

extern const PartInfo polarquant;
constinit const PartInfo polarquant = describe<PolarQuant>();

}  // namespace kvreplay
