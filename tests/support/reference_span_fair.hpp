// The truth about allocators over named spans: a selector whose scores they changed, from the definitions.
#pragma once
#include "tests/support/reference_selection.hpp"

namespace kvreplay::testing {

// Tokens in [begin, end) stay whatever the selector says.
MakeSelector reference_whitelist(MakeSelector select, Pos begin, Pos end);

// The prompt is cut into spans at `borders`; every span, and the decode tokens as one more, keeps the same fraction of
// all its tokens so far, as far as it has them, rounded to the largest remainder.
MakeSelector reference_fair(MakeSelector select, std::vector<Pos> borders);

}  // namespace kvreplay::testing
