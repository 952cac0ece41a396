// From a finished cell to the lines that a sweep keeps of it.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "sim/results.hpp"
#include "sim/sweep/resolved.hpp"
#include "sim/sweep/store.hpp"

namespace kvreplay {

// Of every line, before its columns: "cell,kv_head,q_head,budget_tokens,foresight,group,n_steps".
inline constexpr std::size_t kRowPrefix = 7;

// Lines of one unit. Each is a cell's mean over the heads of the layer, or with --heads also one head's. Every column
// is as many numbers as there are statistics, and then n.
class ItemRows {
 public:
  explicit ItemRows(const Sweep& sweep) : sweep_(sweep) {}
  void add(std::size_t cell, const CellId&, const CellResult&);
  // What was added, with columns in the order of ColumnId.
  void write(ItemHead&, std::string& body) const;

 private:
  using Numbers = std::map<ColumnId, std::string>;  // "mean,...,n"
  struct Line {
    std::string prefix;
    Numbers numbers;
  };
  std::string text(std::span<const Statistics> of_rows) const;

  const Sweep& sweep_;
  std::vector<Line> lines_;
};

}  // namespace kvreplay
