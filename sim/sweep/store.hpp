// What a sweep has finished, on disk: one file per unit, which appears whole or not at all and is never changed.
//
//   kvreplay-item SCHEMA SHA256-OF-HEAD BYTES-OF-BODY SHA256-OF-BODY
//   the head: one line of JSON
//   the body: lines of text
//
// Files are called ID-REST.KIND: ID is the hash of what all keys in the file share, REST is different for every process
// that writes. So any number of processes on any number of machines may write into one folder without a lock.
#pragma once
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "sim/metrics.hpp"

namespace kvreplay {

// One measured thing of a cell, as a column of numbers.
struct ColumnId {
  Metric metric{};
  std::string span;         // of a metric of spans
  std::string compensator;  // canonical; kOwn: the method's own, where it is not one of those measured beside
  auto operator<=>(const ColumnId&) const = default;  // NOLINT(modernize-use-nullptr): clang-tidy 14 sees one in it
};
inline constexpr const char* kOwn = "own";
inline constexpr std::size_t kIdLength = 32;  // of a hash, in file names

enum class ItemKind { cells, failed, measured };

struct ItemHead {
  ItemKind kind = ItemKind::cells;
  std::string id;                       // whole hash of what its keys share
  std::vector<std::string> keys;        // what it holds: line i of the body, or lines that start with i
  std::vector<std::string> detail;      // sorted, as Sweep::detail
  std::vector<std::string> statistics;  // of each column, in this order, and then n
  std::vector<ColumnId> columns;
  // Set by the store.
  std::filesystem::path file;
  std::size_t body_at = 0, body_bytes = 0;
  std::string body_hash;
};

// A name that no other process uses, for something of this id.
std::string unique_name(const std::string& id);
// Removes what processes of this machine that are no more left under such names and ".part".
void remove_left_behind(const std::filesystem::path& folder);

class Store {
 public:
  // Looks at what there is now. `folder` need not exist yet.
  explicit Store(const std::filesystem::path& folder);

  // Of all files whose keys share this, by file name, whatever their kind. A damaged one is named in `damaged` and is
  // as if it were not there.
  std::vector<ItemHead> heads(const std::string& id);
  // False where it is damaged: it is named, and what was measured is set aside, so that nobody takes it for finished.
  bool body(const ItemHead&, std::string& out);
  // Written, synced and renamed to NAME.KIND; throws where the disk is full.
  void add(const ItemHead&, const std::string& body, const std::string& name) const;
  void remove(const ItemHead&) const;  // of failures that are no more

  const std::vector<std::string>& damaged() const { return damaged_; }  // sentences

 private:
  bool read_head(const std::filesystem::path&, ItemHead&);
  void name_damaged(const std::filesystem::path&, const std::string& why);

  std::filesystem::path folder_;
  std::unordered_map<std::string, std::vector<std::string>> files_;  // by the id's first half
  std::vector<std::string> damaged_;
};

}  // namespace kvreplay
