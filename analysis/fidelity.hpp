// How closely the rounds of a search look at the traces.
#pragma once
#include <vector>

namespace kvreplay {

// How closely a round looks: these layers (empty: all), so many of the first decode steps (0: all).
struct Fidelity {
  std::vector<int> layers;
  int max_steps = 0;
};
// The rounds before the last, which sees everything. layers: those that all traces have; first_eviction: the decode
// step before which nothing can differ. Rounds that would cost more than half of the last are left out.
std::vector<Fidelity> fidelities(const std::vector<int>& layers, int n_steps, int first_eviction);

}  // namespace kvreplay
