#include "sim/sweep/store.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "policies/errors.hpp"
#include "sim/results.hpp"
#include "sim/sweep/resolved.hpp"
#include "traces/hash.hpp"

namespace kvreplay {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

constexpr std::string_view kMagic = "kvreplay-item";
constexpr std::string_view kAside = ".damaged";
constexpr std::string_view kKinds[] = {"cells", "failed", "measured"};

std::string host() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  std::string safe;
  for (const char c : std::string_view(name).substr(0, 40)) {
    safe += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  }
  return safe;
}

bool is_hex(std::string_view text) { return text.find_first_not_of("0123456789abcdef") == std::string_view::npos; }

// A file under a temporary name whose writer is no more: "ID-HOST-PID-RANDOM.KIND.part" of a process of this machine.
bool left_behind(const std::string& name) {
  if (!name.ends_with(".part")) {
    return false;
  }
  const std::size_t at = name.find("-" + host() + "-");
  if (at == std::string::npos) {
    return false;
  }
  const long pid = std::strtol(name.c_str() + at + host().size() + 2, nullptr, 10);
  return pid > 0 && ::kill(pid_t(pid), 0) != 0 && errno == ESRCH;
}

std::string head_text(const ItemHead& head) {
  json columns = json::array();
  for (const ColumnId& c : head.columns) {
    columns.push_back({std::string(info(c.metric).name), c.span, c.compensator});
  }
  return json{{"id", head.id},
              {"keys", head.keys},
              {"detail", head.detail},
              {"statistics", head.statistics},
              {"columns", columns}}
             .dump(-1, ' ', false, json::error_handler_t::replace) +
         "\n";
}

void parse_head(const std::string& text, ItemHead& head) {
  const json j = json::parse(text);
  head.id = j.at("id");
  head.keys = j.at("keys").get<std::vector<std::string>>();
  head.detail = j.at("detail").get<std::vector<std::string>>();
  head.statistics = j.at("statistics").get<std::vector<std::string>>();
  for (const json& c : j.at("columns")) {
    const std::string name = c.at(0);
    const auto it =
        std::find_if(all_metrics().begin(), all_metrics().end(), [&](const MetricInfo& i) { return i.name == name; });
    if (it == all_metrics().end()) {
      throw std::runtime_error("it has the metric '" + name + "', which this version does not know");
    }
    head.columns.push_back({it->metric, c.at(1), c.at(2)});
  }
}

}  // namespace

void remove_left_behind(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> all;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (left_behind(it->path().filename().string())) {
      all.push_back(it->path());
    }
  }
  for (const fs::path& path : all) {
    fs::remove_all(path, error);
  }
}

Store::Store(const fs::path& folder) : folder_(folder) {
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.ends_with(".part") || name.ends_with(kAside)) {
      continue;  // being written, or left behind; damaged, and named when that was found
    }
    if (name.size() > kIdLength && name[kIdLength] == '-' && is_hex(std::string_view(name).substr(0, kIdLength)) &&
        std::any_of(std::begin(kKinds), std::end(kKinds),
                    [&](std::string_view kind) { return name.ends_with("." + std::string(kind)); })) {
      files_[name.substr(0, kIdLength)].push_back(name);
    } else {
      name_damaged(it->path(), "it is no item of a sweep");
    }
  }
  for (auto& [id, names] : files_) {
    std::sort(names.begin(), names.end());
  }
}

void Store::name_damaged(const fs::path& file, const std::string& why) {
  std::string sentence = fmt::format("{} is ignored: {}", file.string(), why);
  if (std::find(damaged_.begin(), damaged_.end(), sentence) == damaged_.end()) {
    damaged_.push_back(std::move(sentence));
  }
}

bool Store::read_head(const fs::path& file, ItemHead& head) {
  std::ifstream in(file, std::ios::binary);
  if (!in) {
    std::error_code error;
    if (fs::exists(file, error)) {
      name_damaged(file, "it cannot be read");
    }
    return false;  // or another process has replaced it
  }
  char first[256] = "";
  in.getline(first, sizeof first);
  int schema = 0;
  char head_hash[65] = "", body_hash[65] = "";
  std::size_t bytes = 0;
  char magic[16] = "";
  if (!in || std::sscanf(first, "%15s %d %64s %zu %64s", magic, &schema, head_hash, &bytes, body_hash) != 5 ||
      kMagic != magic) {
    name_damaged(file, "it is no item of a sweep");
    return false;
  }
  if (schema != kSweepSchema) {
    name_damaged(file, fmt::format("it has schema {}, and this version has {}", schema, kSweepSchema));
    return false;
  }
  std::string text;
  std::getline(in, text);
  text += '\n';
  std::error_code error;
  const std::size_t at = std::strlen(first) + 1 + text.size();
  if (sha256(text) != head_hash || fs::file_size(file, error) != at + bytes) {
    name_damaged(file, "it is damaged");
    return false;
  }
  try {
    parse_head(text, head);
  } catch (const std::exception& e) {  // a hash that holds, but another's content
    name_damaged(file, e.what());
    return false;
  }
  head.file = file;
  head.body_at = at;
  head.body_bytes = bytes;
  head.body_hash = body_hash;
  return true;
}

std::vector<ItemHead> Store::heads(const std::string& id) {
  std::vector<ItemHead> all;
  const auto it = files_.find(id.substr(0, kIdLength));
  if (it == files_.end()) {
    return all;
  }
  std::vector<std::string> sound;
  for (const std::string& name : it->second) {
    ItemHead head;
    if (!read_head(folder_ / name, head)) {
      continue;
    }
    head.kind = name.ends_with(".cells")    ? ItemKind::cells
                : name.ends_with(".failed") ? ItemKind::failed
                                            : ItemKind::measured;
    if (head.id == id) {
      all.push_back(std::move(head));
    }
    sound.push_back(name);
  }
  it->second = std::move(sound);  // a damaged one is named once
  return all;
}

bool Store::body(const ItemHead& head, std::string& out) {
  std::ifstream in(head.file, std::ios::binary);
  out.resize(head.body_bytes);
  in.seekg(std::streamoff(head.body_at));
  in.read(out.data(), std::streamsize(out.size()));
  if (in && sha256(out) == head.body_hash) {
    return true;
  }
  name_damaged(head.file, "it is damaged");
  if (head.kind != ItemKind::failed) {
    std::error_code error;
    fs::rename(head.file, head.file.string() + std::string(kAside), error);
    if (error && error != std::errc::no_such_file_or_directory) {  // then another process has set it aside
      throw ConfigError(
          fmt::format("{} is damaged and cannot be renamed: {}; remove it", head.file.string(), error.message()));
    }
  }
  std::vector<std::string>& names = files_[head.id.substr(0, kIdLength)];
  names.erase(std::remove(names.begin(), names.end(), head.file.filename().string()), names.end());
  return false;
}

std::string unique_name(const std::string& id) {
  static std::random_device random;
  return fmt::format("{}-{}-{}-{:08x}", id.substr(0, kIdLength), host(), ::getpid(), random());
}

void Store::add(const ItemHead& head, const std::string& body, const std::string& name) const {
  const std::string text = head_text(head);
  const std::string_view kind = kKinds[static_cast<std::size_t>(head.kind)];
  write_whole(
      folder_ / fmt::format("{}.{}", name, kind),
      fmt::format("{} {} {} {} {}\n", kMagic, kSweepSchema, sha256(text), body.size(), sha256(body)) + text + body,
      folder_ / fmt::format("{}.{}.part", unique_name(head.id), kind));
}

void Store::remove(const ItemHead& head) const {
  std::error_code ignored;
  fs::remove(head.file, ignored);
}

}  // namespace kvreplay
