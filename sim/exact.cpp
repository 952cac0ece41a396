#include "sim/exact.hpp"

#include <algorithm>
#include <limits>

namespace kvreplay {
namespace {
constexpr Eigen::Index kTile = 256;  // tokens per tile: weights, their widened copy and the values stay in L2
}  // namespace

void ExactBlock::reshape(const Layer& l, Pos begin_pos, int n_steps, bool keep_logits) {
  begin = begin_pos;
  steps = n_steps;
  group_size = l.group_size;
  rows = n_steps * group_size;
  // Padding: a stride of 2^k would make the rows of a column fight over cache sets.
  const Eigen::Index n = begin + steps, stride = (rows + 15) / 16 * 16 + 16;
  for (MatF* m : {&weights, &logits}) {
    if (m == &logits && !keep_logits) {
      continue;
    }
    if (m->cols() < stride || m->rows() < n) {
      m->resize(std::max<Eigen::Index>(n, l.n_tokens), std::max(stride, m->cols()));
    }
  }
  z.setZero(rows);
  z_prompt.setZero(rows);
  num.setZero(rows, l.v_head_dim);
  num_prompt.setZero(rows, l.v_head_dim);
}

void ExactBlock::blank(const Layer& l, Pos begin_pos, int n_steps) {
  reshape(l, begin_pos, n_steps, false);
  weights.setZero();
  max_logit.setZero(rows);
}

void ExactBlock::compute(const Layer& l, int kv_head, Pos begin_pos, int n_steps, ValueProduct product,
                         bool keep_logits) {
  reshape(l, begin_pos, n_steps, keep_logits);
  const Eigen::Index n = begin + steps;
  const auto q = l.queries(kv_head, begin, steps);
  MatF& l_out = keep_logits ? logits : weights;
  const auto first_row = [&](Eigen::Index token) {  // causal: the first row that sees this token
    return std::max<Eigen::Index>(0, token - begin) * group_size;
  };

  max_logit.setConstant(rows, -std::numeric_limits<float>::infinity());
  for (Eigen::Index j = 0; j < n; j += kTile) {
    const Eigen::Index m = std::min(kTile, n - j);
    l_out.block(j, 0, m, rows).noalias() = l.k[kv_head].middleRows(j, m) * q.transpose();
    if (l.logit_softcap > 0) {
      soft_cap(l.logit_softcap, l_out.block(j, 0, m, rows).array());
    }
    for (Eigen::Index i = j; i < j + m; ++i) {
      const Eigen::Index first = first_row(i);
      max_logit.tail(rows - first) =
          max_logit.tail(rows - first).max(l_out.row(i).segment(first, rows - first).transpose().array());
    }
  }

  for (Eigen::Index j = 0; j < n;) {
    const Eigen::Index stop = j < l.prompt_len ? std::min<Eigen::Index>(n, l.prompt_len) : n;
    const Eigen::Index m = std::min(kTile, stop - j);
    for (Eigen::Index i = j; i < j + m; ++i) {
      auto row = weights.row(i).head(rows).transpose().array();
      row = weight_of(l_out.row(i).head(rows).transpose().array() - max_logit);
      row.head(first_row(i)).setZero();
      z += row.cast<double>();
    }
    if (product == ValueProduct::f64) {
      wide_ = weights.block(j, 0, m, rows).cast<double>();
      wide_v_ = l.v[kv_head].middleRows(j, m).cast<double>();
      num.noalias() += wide_.transpose() * wide_v_;
    } else if (product == ValueProduct::f32) {
      part_.noalias() = weights.block(j, 0, m, rows).transpose() * l.v[kv_head].middleRows(j, m);
      num += part_.cast<double>();
    }
    j += m;
    if (j == l.prompt_len) {
      z_prompt = z;
      num_prompt = num;
    }
  }
}

void ExactBlock::add_column_mass(MatD& mass, double sign) const {
  const Eigen::ArrayXf inv_z = z.inverse().cast<float>();
  Eigen::ArrayXf attn(rows);
  for (Eigen::Index j = 0; j < begin + steps; ++j) {
    attn = weights.row(j).head(rows).transpose().array() * inv_z;
    mass.col(j) += sign * MapF(attn.data(), steps, group_size).colwise().sum().transpose().cast<double>();
  }
}

MatD column_mass(const Layer& l, int kv_head, Pos begin, Pos end) {
  constexpr int kSteps = 64;
  MatD mass = MatD::Zero(l.group_size, end);
  ExactBlock b;
  for (Pos t = begin; t < end; t += kSteps) {
    b.compute(l, kv_head, t, std::min<Pos>(kSteps, end - t), ValueProduct::none, false);
    b.add_column_mass(mass, 1);
  }
  return mass;
}

}  // namespace kvreplay
