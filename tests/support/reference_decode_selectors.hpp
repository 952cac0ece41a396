// The truth about selectors that work while decoding, step by step in float64, from their definitions.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// Per KV head of the set: mean cosine of each slot's key with the others, each row forgiving its most recent neighbour
// above the threshold; a row without one forgives slot 0 if `first`. Softmax over the slots, mean over the KV heads.
std::vector<double> reference_redundancy(const SetState& s, double threshold, bool first, double temperature = 1);

enum class ReferenceSmooth { max, mean, sum, none };
struct ReferenceGkv {
  int window = 16;
  ReferenceSmooth smooth = ReferenceSmooth::max;
  double alpha = 0.8, lambda = 0.5;
  bool normalise = true;
  int kernel = 1;  // of the max pooling; 1: none
  double threshold = 0.5;
  bool first = false;  // see reference_redundancy
  double temperature = 1, gamma = 0, ratio = 0;
};
MakeSelector reference_gkv(const ReferenceGkv& settings = {});

struct ReferenceRkv {
  int window = 8, buffer = 128;
  double lambda = 0.1;
  int kernel = 7;
  double threshold = 0.5;
  bool first = true;
};
MakeSelector reference_rkv(const ReferenceRkv& settings = {});

struct ReferenceScope {
  enum class Mode { slide, adaptive, discontinuous } mode = Mode::slide;
  int window = 256;
  bool cumulative = false, paper = false;
  int steps = 0;  // 0: those of the layer
};
MakeSelector reference_scope(const ReferenceScope& settings = {});

struct ReferenceLazyEviction {
  int window = 52;
  double threshold = 5e-4;
  bool paper = false, open = false;
};
MakeSelector reference_lazyeviction(const ReferenceLazyEviction& settings = {});

struct ReferenceRaas {
  int page = 16;
  bool by_threshold = false;
  double fraction = 0.5, threshold = 1e-4;
};
MakeSelector reference_raas(const ReferenceRaas& settings = {});

// H2O where only the current query counts: at the prompt's end all its queries, later one.
MakeSelector reference_h2o_current(ReferenceTokens window = {0.5, true});
// The first slots of the pool and the latest `window`.
MakeSelector reference_streaming_first(int window, int sink = 4);

}  // namespace kvreplay::testing
