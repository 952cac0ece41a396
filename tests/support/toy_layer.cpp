#include "tests/support/toy_layer.hpp"

#include <cmath>
#include <random>

namespace kvreplay::testing {
namespace {

// Rounds to `precision` significant bits; exponents below `min_exponent` (of the leading bit)
// become subnormal.
double round_bits(double x, int precision, int min_exponent) {
  if (x == 0 || !std::isfinite(x)) {
    return x;
  }
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| in [0.5, 1) * 2^exponent
  const int last_bit = std::max(exponent - 1, min_exponent) - (precision - 1);
  return std::ldexp(std::nearbyint(std::ldexp(x, -last_bit)), last_bit);
}

class Draw {
 public:
  explicit Draw(unsigned seed) : engine_(seed) {}
  // Own Box-Muller: std::normal_distribution differs between standard libraries, expected results
  // must not.
  double normal() {
    const double u = uniform();
    const double angle = 2 * M_PI * uniform();
    return std::sqrt(-2 * std::log(u)) * std::cos(angle);
  }
  double uniform() { return (static_cast<double>(engine_()) + 0.5) / 4294967296.0; }  // in (0, 1)
  int below(int n) { return static_cast<int>(uniform() * n); }
  MatD matrix(Eigen::Index rows, Eigen::Index cols, double size) {
    MatD m(rows, cols);
    for (Eigen::Index i = 0; i < m.size(); ++i) {
      m.data()[i] = size * normal();
    }
    return m;
  }

 private:
  std::mt19937 engine_;
};

// Half of the channels turn with position, slowly in the first and fast in the last: near positions
// are alike.
void add_position(MatD& m, double size) {
  const Eigen::Index pairs = m.cols() / 4;
  for (Eigen::Index p = 0; p < pairs; ++p) {
    const double frequency = 0.5 * std::pow(0.15, static_cast<double>(p) / static_cast<double>(pairs));
    for (Eigen::Index t = 0; t < m.rows(); ++t) {
      m(t, 2 * p) += size * std::cos(frequency * static_cast<double>(t));
      m(t, 2 * p + 1) += size * std::sin(frequency * static_cast<double>(t));
    }
  }
}

void structured(ToyLayer& layer, Draw& draw, double sharpness) {
  const ToyOptions& o = layer.options;
  const Eigen::Index last = o.head_dim - 1;  // the channel of the sinks
  for (int kv = 0; kv < o.n_kv_heads; ++kv) {
    MatD k = draw.matrix(o.n_tokens, o.head_dim, 1.0);
    MatD v = draw.matrix(o.n_tokens, o.v_head_dim, 1.0);
    const MatD k_mean = draw.matrix(1, o.head_dim, 1.5);
    const MatD v_mean = draw.matrix(1, o.v_head_dim, 0.5);
    // Values follow keys in part, so that a value-key covariance has something to find.
    const MatD v_of_k = draw.matrix(o.head_dim, o.v_head_dim, 0.5 / std::sqrt(o.head_dim));
    v += k * v_of_k;
    k.rowwise() += k_mean.row(0);
    v.rowwise() += v_mean.row(0);
    add_position(k, 1.0);
    k.col(last).setConstant(0);
    for (Pos t = 0; t < std::min<Pos>(2, o.n_tokens); ++t) {
      k(t, last) = 4;
      v.row(t) *= 0.1;
    }
    for (int head = 0; head < o.group_size; ++head) {
      MatD q = draw.matrix(o.n_tokens, o.head_dim, 0.8);
      add_position(q, 1.2);
      q.col(last).setConstant(3);
      const bool retrieves = (kv * o.group_size + head) % 3 == 1;
      for (Pos t = 1; retrieves && t < o.n_tokens; ++t) {
        q.row(t) += 1.2 * (k.row(draw.below(t)) - k_mean.row(0));
      }
      layer.q.push_back(sharpness * q);
    }
    layer.k.push_back(std::move(k));
    layer.v.push_back(std::move(v));
  }
}

void huge_logits(ToyLayer& layer, Draw& draw) {
  const ToyOptions& o = layer.options;
  for (int kv = 0; kv < o.n_kv_heads; ++kv) {
    // Small integers: every product and sum is exact in float32, so huge logits lose nothing before
    // exp.
    MatD k = draw.matrix(o.n_tokens, o.head_dim, 1.0).unaryExpr([](double x) { return std::nearbyint(x); });
    k.col(0) = draw.matrix(o.n_tokens, 1, 40).unaryExpr([](double x) { return std::nearbyint(x); });
    layer.k.push_back(std::move(k));
    layer.v.push_back(draw.matrix(o.n_tokens, o.v_head_dim, 1.0));
    for (int head = 0; head < o.group_size; ++head) {
      MatD q = draw.matrix(o.n_tokens, o.head_dim, 1.0).unaryExpr([](double x) { return std::nearbyint(x); });
      // One query in four stays mild; the others reach 1e4 either way.
      for (Pos t = 0; t < o.n_tokens; ++t) {
        q(t, 0) = t % 4 == 0 ? 0 : (t % 2 == 0 ? 384 : -384);
      }
      layer.q.push_back(std::move(q));
    }
  }
}

void small_evicted(ToyLayer& layer, Draw& draw) {
  const ToyOptions& o = layer.options;
  // Logits of the first two tokens stand above all others by so much that the others together weigh
  // 4e-6.
  const double gap = std::log(o.n_tokens / (2 * 4e-6));
  for (int kv = 0; kv < o.n_kv_heads; ++kv) {
    MatD k = draw.matrix(o.n_tokens, o.head_dim, 0.3);
    k.col(0).setConstant(0);
    k.col(0).head(2).setConstant(1);
    layer.k.push_back(std::move(k));
    layer.v.push_back(draw.matrix(o.n_tokens, o.v_head_dim, 1.0));
    for (int head = 0; head < o.group_size; ++head) {
      MatD q = draw.matrix(o.n_tokens, o.head_dim, 0.5);
      q.col(0).setConstant(gap / layer.scale);
      layer.q.push_back(std::move(q));
    }
  }
}

}  // namespace

double round_to(double x, Element element) {
  switch (element) {
    case Element::f32:
      return static_cast<double>(static_cast<float>(x));
    case Element::f16:
      return round_bits(x, 11, -14);
    case Element::bf16:
      return round_bits(x, 8, -126);
  }
  return x;
}

int element_bytes(Element element) { return element == Element::f32 ? 4 : 2; }

ToyLayer make_toy_layer(const ToyOptions& options) {
  ToyLayer layer;
  layer.options = options;
  // A power of two: scaled queries are exact in float32 too.
  layer.scale = std::ldexp(1.0, -static_cast<int>(std::lround(std::log2(options.head_dim) / 2)));
  Draw draw(options.seed);
  switch (options.kind) {
    case ToyKind::structured:
      structured(layer, draw, 1);
      break;
    case ToyKind::sharp:
      structured(layer, draw, 8);
      break;
    case ToyKind::huge_logits:
      huge_logits(layer, draw);
      break;
    case ToyKind::small_evicted:
      small_evicted(layer, draw);
      break;
    case ToyKind::equal_keys:
      structured(layer, draw, 1);
      for (MatD& k : layer.k) {
        k.rowwise() = Eigen::RowVectorXd(k.row(0));
      }
      break;
  }
  if (options.hidden > 0) {
    layer.w_o = draw.matrix(options.hidden, layer.n_heads() * options.v_head_dim, 0.2);
  }
  const auto round = [&](double x) { return round_to(x, options.element); };
  for (std::vector<MatD>* side : {&layer.q, &layer.k, &layer.v}) {
    for (MatD& m : *side) {
      m = m.unaryExpr(round).eval();
    }
  }
  layer.w_o = layer.w_o.unaryExpr(round).eval();
  return layer;
}

}  // namespace kvreplay::testing
