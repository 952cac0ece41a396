// What a run gave, kept in memory.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "sim/results.hpp"

namespace kvreplay::python {

struct Cell {
  CellId id;
  CellResult result;
};

struct Results {
  std::vector<std::shared_ptr<Cell>> cells;
  std::vector<std::string> failed;  // one sentence per cell or trace that failed
};

}  // namespace kvreplay::python
