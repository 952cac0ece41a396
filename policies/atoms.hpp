// The evicted tokens as a few atoms, each one more entry of the softmax:
//   logit_c = ln n_c + q . k_c + kappa_c(q),   value_c = v_c + t_c C_c q
// with n_c tokens of mean key k_c and mean value v_c, kappa_c what the variance of their logits adds to
// the mass, C_c their value-key covariance. One atom with kappa = 0 and full C is MomentKV, many with
// neither are ResKV's clusters, kappa from a low-rank covariance is COBS' block mass.
#pragma once
#include <span>
#include <vector>

#include "policies/policy.hpp"

namespace kvreplay {

struct AtomForm {
  enum class Kappa { none, diagonal, lowrank };
  enum class Tilt { none, full, lowrank };
  Kappa kappa = Kappa::none;
  Tilt tilt = Tilt::none;
  int rank = 8;         // of either where it is low-rank
  double strength = 1;  // factor on kappa
  bool freeze = false;  // beyond a spread of sqrt(2 ln n) kappa grows linearly and the tilt stops
  bool clip = false;    // kappa and tilt stay within the reach of the atom's keys and values
};

struct AtomRule {
  enum class Assign { one, blocks, nearest };
  Assign assign = Assign::one;
  int most = 1;        // atoms
  Pos width = 1;       // blocks: tokens of the text that share an atom; the last atom takes the rest
  int iterations = 4;  // nearest: Lloyd's, on the first tokens that leave together
  int every = 0;       // nearest: all evicted tokens are clustered anew every so many decode steps; 0: never
  double decay = 1;    // what a step leaves of the statistics' weights
};

// Statistics of one atom's tokens, in double: what a method keeps of them is float32.
struct Atom {
  double n = 0;
  Eigen::RowVectorXd k, v;            // means: (head_dim), (v_head_dim)
  Eigen::RowVectorXd squares;         // (head_dim) sum of (k - mean)^2
  MatD factors;                       // (<= rank, head_dim) factors^T factors: the leading part of the keys' scatter
  MatD scatter;                       // (head_dim, v_head_dim) sum of (k - mean)^T (v - mean)
  MatD left, right;                   // (<= rank, .) left^T right: the leading part of the same
  double radius_k = 0, radius_v = 0;  // every key, value lies within this of its mean
  int time = 0;                       // decode step at which the weights above were right

  void join(const AtomForm& form, const Eigen::Ref<const MatD>& keys, const Eigen::Ref<const MatD>& values);
};

// Follows one lane through the blocks. An atom that changes inside a block is another atom for the rows from then on,
// so that all logits and all values of a block are two matrix products.
class AtomTrack {
 public:
  AtomTrack(const AtomForm& form, const AtomRule& rule, int head_dim, int v_head_dim);
  // Before the first tokens leave: which of them Lloyd's centres start at, best first; else evenly spaced ones.
  void start_from(std::vector<Pos> tokens) { starts_ = std::move(tokens); }
  void estimate(const EvictedBlock& block, Estimate& out);
  // What a method has to keep: numbers of one atom.
  static double numbers(const AtomForm& form, int head_dim, int v_head_dim);

 private:
  struct Version {  // of an atom, for the rows of some steps
    int begin, end;
    double log_n;
    Eigen::ArrayXd kappa;  // (rows) or empty
    MatD tilt;             // (rows, v_head_dim) or empty
  };

  void join(std::span<const Loss> losses, int step, bool seen);
  std::vector<std::size_t> assign(std::span<const Loss> losses, const Eigen::Ref<const MatD>& keys);
  std::vector<std::size_t> cluster(std::span<const Loss> losses, const Eigen::Ref<const MatD>& keys, bool anew) const;
  void open(std::size_t atom, int step);
  void close(std::size_t atom, int step);
  void terms(const Atom& atom, Eigen::Index from, Eigen::Index n_rows, Version& version) const;
  void merge(Estimate& out) const;

  AtomForm form_;
  AtomRule rule_;
  int head_dim_, v_head_dim_;
  std::vector<Atom> atoms_;  // those with n = 0 are not there
  std::vector<Pos> starts_;
  std::vector<Loss> seen_;  // nearest with `every`: all tokens so far
  int now_ = 0;             // decode steps before this block
  // Of this block.
  MatD q_, squares_;        // (rows, head_dim) queries, and their squares where kappa is diagonal
  Eigen::ArrayXd lengths_;  // (rows) of the queries, to clip by
  int n_heads_ = 1;
  std::vector<Version> versions_;
  MatD version_k_, version_v_;     // (>= versions, .) their mean keys and values
  std::vector<std::size_t> open_;  // per atom: its latest version
};

}  // namespace kvreplay
