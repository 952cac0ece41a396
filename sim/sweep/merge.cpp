#include "sim/sweep/merge.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "sim/sweep/sweep.hpp"
#include "sim/sweep/tables.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// The plan without what differs from machine to machine.
Json comparable(const Sweep& sweep) {
  Json j = sweep.json();
  for (Json& trace : j.at("traces")) {
    trace.erase("path");
    trace.erase("stamp");
  }
  j.erase("tables");
  j.erase("failed_traces");
  return j;
}

void refuse_other_plan(const Sweep& a, const fs::path& folder_a, const Sweep& b, const fs::path& folder_b) {
  const Json one = comparable(a), other = comparable(b);
  for (const auto& [key, value] : one.items()) {
    if (value != other.at(key)) {
      throw ConfigError(
          fmt::format("{} and {} are of different plans: their {} differ", folder_a.string(), folder_b.string(), key));
    }
  }
}

// An item never changes, so that a second name for it is as good as a copy.
void take(const fs::path& from, const fs::path& to) {
  std::error_code error;
  for (fs::directory_iterator it(from, error), end; !error && it != end; it.increment(error)) {
    const fs::path name = it->path().filename(), target = to / name;
    if (name.extension() == ".part") {
      continue;
    }
    if (it->is_directory()) {
      fs::create_directories(target);
      take(it->path(), target);
      continue;
    }
    if (fs::exists(target)) {
      continue;
    }
    std::error_code other_disk;
    fs::create_hard_link(it->path(), target, other_disk);
    if (other_disk) {
      const fs::path part = to / (unique_name(name.string()) + ".part");
      fs::copy_file(it->path(), part, fs::copy_options::overwrite_existing);
      fs::rename(part, target);
    }
  }
}

}  // namespace

SweepState merge(const std::vector<fs::path>& folders, const fs::path& out, const std::vector<std::string>& argv) {
  const Sweep sweep = read_sweep(folders.front());
  for (const fs::path& folder : folders) {
    refuse_other_plan(sweep, folders.front(), read_sweep(folder), folder);
  }
  std::error_code error;
  if (fs::exists(out / "sweep.json", error)) {
    refuse_other_plan(sweep, folders.front(), read_sweep(out), out);
  } else if (fs::exists(out, error) && (!fs::is_directory(out, error) || !fs::is_empty(out, error))) {
    throw ConfigError("--out " + out.string() + " holds something else than this sweep; name another folder");
  }
  fs::create_directories(out / "items", error);
  if (error) {
    throw ConfigError("--out " + out.string() + " cannot be made: " + error.message());
  }
  for (const fs::path& folder : folders) {
    if (!fs::equivalent(folder, out)) {
      take(folder / "items", out / "items");
      if (fs::exists(folder / "runs")) {
        fs::create_directories(out / "runs");
        take(folder / "runs", out / "runs");
      }
    }
  }
  Store store(out / "items");
  while (!write_tables(sweep, store, out)) {  // without the item that turned out to be damaged
  }
  SweepState state = state_of(sweep, store);
  write_sweep(out, sweep, argv, &state);
  return state;
}

}  // namespace kvreplay
