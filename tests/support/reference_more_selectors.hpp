// The truth about selectors that weigh values, count, look ahead or compare keys, from their definitions in float64.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

struct MorphKv {
  int obs_window = 32;
  bool fuse_max = false, joint = false, skip_oldest = true;
  double evict_after = 1;
};
MakeSelector reference_morphkv(const MorphKv& settings = {});

struct Rpc {
  int obs_window = 32, ratio = 4, kernel = 7;
  bool repeat_newest = true;
};
MakeSelector reference_rpc(const Rpc& settings = {});

struct LongFlow {
  bool l2 = false;
  int obs_window = 32, kernel = 5;
};
MakeSelector reference_longflow(const LongFlow& settings = {});

struct Vatp {
  int sink = 0;
  ReferenceTokens window{0.5, true};
  bool l1 = false, sum = false;
};
MakeSelector reference_vatp(const Vatp& settings = {});

struct Scissorhands {
  ReferenceTokens window{0.25, true}, history{0.5, true}, drop{0.5, true};
};
MakeSelector reference_scissorhands(const Scissorhands& settings = {});

struct ExpectedAttention {
  int sink = 4, future = 512;
  bool covariance = true, value_norm = true;
  double epsilon = 0;
  bool kvpress = false;
  int buffer = 256;
};
MakeSelector reference_expected(const ExpectedAttention& settings = {});

struct InfiniPot {
  int sink = 4;
  ReferenceTokens delta{0.25, true};
  int block = 16;
  char mapping = 'A';  // same offset, best match, nearest token, centroid
  bool raw = false;
  double tar_ratio = 0.5, query_ratio = 0.25;
  int kernel = 1;
  bool once = false;
};
MakeSelector reference_infinipot(const InfiniPot& settings = {});

}  // namespace kvreplay::testing
