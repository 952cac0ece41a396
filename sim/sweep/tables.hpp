// The tables of a sweep, made from its finished items: the same bytes, however and by whom they were finished.
#pragma once
#include <filesystem>

#include "sim/sweep/resolved.hpp"
#include "sim/sweep/store.hpp"

namespace kvreplay {

// FOLDER/cells.csv, one row per finished cell and layer, in the order of the plan; where heads are kept also
// FOLDER/heads.csv, one row per head. False, and nothing written, where an item turned out to be damaged: its cells are
// not finished after all, and the store has named it.
bool write_tables(const Sweep&, Store&, const std::filesystem::path& folder);

}  // namespace kvreplay
