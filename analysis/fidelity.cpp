#include "analysis/fidelity.hpp"

#include <algorithm>
#include <utility>

namespace kvreplay {

std::vector<Fidelity> fidelities(const std::vector<int>& layers, int n_steps, int first_eviction) {
  constexpr int kBlock = 64;
  struct Look {
    int layers_of, steps_of, least_steps;  // one layer of so many, one step of so many after the first eviction
  };
  std::vector<Fidelity> rounds;
  const int n_layers = int(layers.size());
  for (const Look look : {Look{4, 4, 128}, Look{2, 2, 256}}) {
    if (n_layers == 0) {
      break;
    }
    const int n = (n_layers + look.layers_of - 1) / look.layers_of;
    const int after = std::max(look.least_steps, (n_steps - first_eviction) / look.steps_of);
    const int steps = std::min(n_steps, (first_eviction + after + kBlock - 1) / kBlock * kBlock);
    if (2.0 * n * steps > double(n_layers) * n_steps) {
      continue;
    }
    Fidelity f{{}, steps};
    for (int i = 0; i < n; ++i) {  // evenly spaced, neither all at the start nor at the end
      f.layers.push_back(layers[std::size_t((2 * i + 1) * n_layers / (2 * n))]);
    }
    rounds.push_back(std::move(f));
  }
  return rounds;
}

}  // namespace kvreplay
