#include "sim/sweep/tables.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>

#include "policies/errors.hpp"
#include "sim/results.hpp"
#include "sim/sweep/rows.hpp"
#include "sim/sweep/state.hpp"
#include "sim/whole_file.hpp"

namespace kvreplay {
namespace {

using Fields = std::vector<std::string_view>;

void split(std::string_view line, Fields& out) {
  out.clear();
  for (std::size_t begin = 0; begin <= line.size();) {
    const std::size_t end = std::min(line.find(',', begin), line.size());
    out.push_back(line.substr(begin, end - begin));
    begin = end + 1;
  }
}

class Tables {
 public:
  Tables(const Sweep& sweep, Store& store) : sweep_(sweep), store_(store) {}

  bool write(const std::filesystem::path& folder) {
    std::set<ColumnId> columns;  // that some row of the sweep has
    const bool sound = each_layer([&](const SweepTrace&, int, int, const ItemHead& item, const Fields& fields) {
      const std::size_t width = item.statistics.size() + 1;
      for (std::size_t c = 0; c < item.columns.size(); ++c) {
        if (!fields[kRowPrefix + c * width + width - 1].empty()) {
          columns.insert(item.columns[c]);
        }
      }
    });
    if (!sound) {
      return false;
    }
    columns_.assign(columns.begin(), columns.end());
    std::stable_sort(columns_.begin(), columns_.end(), [&](const ColumnId& a, const ColumnId& b) {
      return std::tuple(a.metric, a.span, rank(a)) < std::tuple(b.metric, b.span, rank(b));
    });
    for (const SweepMethod& m : sweep_.methods) {
      for (const auto& [name, text] : m.params) {
        if (std::find(params_.begin(), params_.end(), name) == params_.end()) {
          params_.push_back(name);
        }
      }
    }
    WholeFile cells(folder / "cells.csv", part(folder / "cells.csv"));
    std::optional<WholeFile> heads;
    cells.add(header(false));
    if (sweep_.heads()) {
      heads.emplace(folder / "heads.csv", part(folder / "heads.csv"));
      heads->add(header(true));
    }
    const bool whole =
        each_layer([&](const SweepTrace& trace, int layer, int config, const ItemHead& item, const Fields& fields) {
          const bool of_head = !fields[1].empty();
          if (!of_head) {
            cells.add(row(trace, layer, config, item, fields, false));
          } else if (heads) {
            heads->add(row(trace, layer, config, item, fields, true));
          }
        });
    if (!whole) {
      return false;
    }
    cells.publish();
    if (heads) {
      heads->publish();
    } else {
      std::error_code ignored;
      std::filesystem::remove(folder / "heads.csv", ignored);  // of a plan that kept them
    }
    return true;
  }

 private:
  // Two processes that finish at once must not write into each other's file.
  static std::filesystem::path part(const std::filesystem::path& path) {
    return path.parent_path() / (unique_name(path.filename().string()) + ".part");
  }

  std::size_t rank(const ColumnId& c) const {
    return std::size_t(std::find(sweep_.compensators.begin(), sweep_.compensators.end(), c.compensator) -
                       sweep_.compensators.begin());
  }

  using EachRow = std::function<void(const SweepTrace&, int layer, int config, const ItemHead&, const Fields&)>;

  // Every line of every finished cell, in the order of the plan. False where an item is damaged.
  bool each_layer(const EachRow& row) {
    bool sound = true;
    for (const SweepTrace& trace : sweep_.traces) {
      for (const int layer : trace.layers) {
        sound = each_row(trace, layer, row) && sound;
      }
    }
    return sound;
  }

  bool each_row(const SweepTrace& trace, int layer, const EachRow& row) {
    const LayerState state = state_of(sweep_, store_, trace, layer);
    std::vector<std::string> bodies(state.items.size());
    std::vector<std::vector<std::vector<std::string_view>>> lines(state.items.size());  // by item, by key
    Fields fields;
    for (const int used : std::set<int>(state.item.begin(), state.item.end())) {
      if (used < 0) {
        continue;
      }
      const auto i = std::size_t(used);
      if (!store_.body(state.items[i], bodies[i])) {
        return false;
      }
      lines[i].resize(state.items[i].keys.size());
      const std::string_view body = bodies[i];
      for (std::size_t begin = 0; begin < body.size();) {
        const std::size_t end = std::min(body.find('\n', begin), body.size());
        const std::string_view line = body.substr(begin, end - begin);
        lines[i].at(std::stoul(std::string(line.substr(0, line.find(','))))).push_back(line);
        begin = end + 1;
      }
    }
    for (int c = 0; c < int(sweep_.configs.size()); ++c) {
      const int item = state.item[std::size_t(c)];
      if (item < 0) {
        continue;
      }
      for (const std::string_view line : lines[std::size_t(item)][std::size_t(state.line[std::size_t(c)])]) {
        split(line, fields);
        row(trace, layer, c, state.items[std::size_t(item)], fields);
      }
    }
    return true;
  }

  std::string header(bool heads) const {
    std::string text = heads ? "trace,layer,kv_head,q_head,method,label,budget" : "trace,layer,method,label,budget";
    for (const std::string& name : params_) {
      text += "," + csv_field("param." + name);
    }
    text += ",budget_tokens,foresight,group,n_steps";
    const auto name = [](const ColumnId& c, const std::string& statistic) {
      return csv_field(std::string(info(c.metric).name) + (c.span.empty() ? "" : ":" + c.span) +
                       (c.compensator.empty() ? "" : "." + c.compensator) +
                       (statistic == "mean" ? "" : ":" + statistic));
    };
    for (const ColumnId& c : columns_) {
      for (const std::string& statistic : sweep_.statistics) {
        text += "," + name(c, statistic);
      }
    }
    for (const ColumnId& c : columns_) {
      text += "," + name(c, "n");
    }
    return text + "\n";
  }

  std::string row(const SweepTrace& trace, int layer, int config, const ItemHead& item, const Fields& fields,
                  bool of_head) const {
    const SweepMethod& m = sweep_.method(config);
    std::string text = fmt::format("{},{},", csv_field(trace.stem), layer);
    if (of_head) {
      text += fmt::format("{},{},", fields[1], fields[2]);
    }
    text += fmt::format("{},{},{}", csv_field(m.name), csv_field(m.label), csv_field(sweep_.budget(config)));
    for (const std::string& name : params_) {
      const auto it = std::find_if(m.params.begin(), m.params.end(), [&](const auto& p) { return p.first == name; });
      text += "," + (it == m.params.end() ? "" : csv_field(it->second));
    }
    for (std::size_t i = 3; i < kRowPrefix; ++i) {
      text += "," + std::string(fields[i]);
    }
    const std::size_t width = item.statistics.size() + 1;
    std::vector<std::size_t> at;  // of each column's first field; 0: the item has none
    for (const ColumnId& c : columns_) {
      const auto it = std::lower_bound(item.columns.begin(), item.columns.end(), c);
      at.push_back(it == item.columns.end() || *it != c ? 0
                                                        : kRowPrefix + std::size_t(it - item.columns.begin()) * width);
    }
    for (const std::string& statistic : sweep_.statistics) {
      KVREPLAY_CHECK(std::find(item.statistics.begin(), item.statistics.end(), statistic) != item.statistics.end());
    }
    for (const std::size_t a : at) {
      for (const std::string& statistic : sweep_.statistics) {
        const auto s = std::find(item.statistics.begin(), item.statistics.end(), statistic) - item.statistics.begin();
        text += ",";
        text += a == 0 ? "" : fields[a + std::size_t(s)];
      }
    }
    for (const std::size_t a : at) {
      text += ",";
      text += a == 0 ? "" : fields[a + width - 1];
    }
    return text + "\n";
  }

  const Sweep& sweep_;
  Store& store_;
  std::vector<ColumnId> columns_;
  std::vector<std::string> params_;  // that any grid set
};

}  // namespace

bool write_tables(const Sweep& sweep, Store& store, const std::filesystem::path& folder) {
  return Tables(sweep, store).write(folder);
}

}  // namespace kvreplay
