// The method matrix: every method against the float64 reference, selection on the engine's own states and every
// metric on its own sets.
#pragma once
#include "tests/support/reference_compare.hpp"

namespace kvreplay::testing {

struct Case {
  std::string text;
  MakeSelector select;
  Traits traits;  // as the paper has it: the text must come to the same
  bool budgeted = true;
  int least_budget = 1;  // below it the text's own numbers do not fit
};

Traits traits(Scope scope, Pool pool = Pool::all, Order order = Order::after_attention, Decode decode = Decode::evict);

// A layer of 72 tokens with values shorter than keys and an output projection.
ToyOptions options(int group_size, Pos prompt_len, Element element);
std::string describe(const ToyOptions& options);

SelectionRequest request_of(const Case& c, int budget);

// Selection and metrics of all cases at all budgets on one layer, replayed together.
void check_layer(const ToyOptions& options, const std::vector<Case>& cases, const std::vector<int>& budgets,
                 bool with_compensators = true);

}  // namespace kvreplay::testing
