#include "sim/sweep/rows.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "policies/help.hpp"

namespace kvreplay {
namespace {

std::string number(double x) { return std::isnan(x) ? "" : fmt::format("{:.9g}", x); }

double value(const Statistics& s, const std::string& name) {
  return name == "mean"  ? s.mean
         : name == "std" ? s.std
         : name == "p50" ? s.p50
         : name == "p90" ? s.p90
         : name == "p99" ? s.p99
                         : s.max;
}

}  // namespace

// Over the rows that counted at all: the mean of all counted steps, as reports pool it; of every other statistic the
// mean over the rows.
std::string ItemRows::text(std::span<const Statistics> of_rows) const {
  std::string all;
  double n = 0, rows = 0;
  for (const Statistics& s : of_rows) {
    n += s.n;
    rows += s.n > 0 ? 1 : 0;
  }
  for (const std::string& name : sweep_.statistics) {
    double sum = 0;
    for (const Statistics& s : of_rows) {
      sum += s.n > 0 ? value(s, name) * (name == "mean" ? s.n / n : 1 / rows) : 0;
    }
    all += number(of_rows.size() == 1 ? value(of_rows[0], name) : n > 0 ? sum : std::nan("")) + ",";
  }
  return all + fmt::format("{:.0f}", n);
}

void ItemRows::add(std::size_t cell, const CellId& id, const CellResult& result) {
  const int group_size = id.n_heads / id.n_kv_heads;
  Numbers layer;
  std::vector<Numbers> q_heads(std::size_t(sweep_.heads() ? id.n_heads : 0)),
      kv_heads(std::size_t(sweep_.heads() ? id.n_kv_heads : 0));
  for (const Series& s : result.series) {
    ColumnId column{s.metric, s.span, ""};
    if (s.compensator >= 0) {
      column.compensator = result.compensators[std::size_t(s.compensator)];
      if (std::find(sweep_.compensators.begin(), sweep_.compensators.end(), column.compensator) ==
          sweep_.compensators.end()) {
        column.compensator = kOwn;
      }
    }
    std::vector<Statistics> rows;
    for (int r = 0; r < s.rows; ++r) {
      rows.push_back(statistics(s.row(r)));
    }
    layer[column] = text(rows);
    if (sweep_.heads() && info(s.metric).level != Level::layer) {
      std::vector<Numbers>& heads = info(s.metric).level == Level::query_head ? q_heads : kv_heads;
      for (std::size_t r = 0; r < rows.size(); ++r) {
        heads[r][column] = text({&rows[r], 1});
      }
    }
  }
  const auto add_line = [&](const std::string& kv_head, const std::string& q_head, Numbers numbers) {
    lines_.push_back({fmt::format("{},{},{},{},{},{},{}", cell, kv_head, q_head,
                                  id.budget_tokens < 0 ? "" : fmt::to_string(id.budget_tokens),
                                  foresight_name(id.foresight), id.group, result.n_steps),
                      std::move(numbers)});
  };
  add_line("", "", std::move(layer));
  for (std::size_t h = 0; h < kv_heads.size(); ++h) {
    add_line(fmt::to_string(h), "", std::move(kv_heads[h]));
    for (std::size_t q = h * std::size_t(group_size); q < (h + 1) * std::size_t(group_size); ++q) {
      add_line(fmt::to_string(h), fmt::to_string(q), std::move(q_heads[q]));
    }
  }
}

void ItemRows::write(ItemHead& head, std::string& body) const {
  std::set<ColumnId> columns;
  for (const Line& line : lines_) {
    for (const auto& [column, text] : line.numbers) {
      columns.insert(column);
    }
  }
  head.columns.assign(columns.begin(), columns.end());
  head.detail = sweep_.detail;
  head.statistics = sweep_.statistics;
  const std::string none(sweep_.statistics.size(), ',');
  for (const Line& line : lines_) {
    body += line.prefix;
    for (const ColumnId& column : head.columns) {
      const auto it = line.numbers.find(column);
      body += "," + (it == line.numbers.end() ? none : it->second);
    }
    body += "\n";
  }
}

}  // namespace kvreplay
