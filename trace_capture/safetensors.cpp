#include "trace_capture/safetensors.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>

#include "policies/errors.hpp"
#include "trace_capture/json.hpp"
#include "traces/hash.hpp"

namespace kvreplay {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr std::size_t kMaxRank = 16;
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

struct Dtype {
  std::string_view name;
  std::uint64_t bytes;
  std::optional<ElementType> type;  // nothing = we do not compute with it
};
constexpr std::array<Dtype, 14> kDtypes{{
    {"F32", 4, ElementType::f32},
    {"F16", 2, ElementType::f16},
    {"BF16", 2, ElementType::bf16},
    {"F64", 8, {}},
    {"I64", 8, {}},
    {"U64", 8, {}},
    {"I32", 4, {}},
    {"U32", 4, {}},
    {"I16", 2, {}},
    {"U16", 2, {}},
    {"I8", 1, {}},
    {"U8", 1, {}},
    {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},
}};

const Dtype* find_dtype(std::string_view name) {
  const auto it = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const Dtype& d) { return d.name == name; });
  return it == kDtypes.end() ? nullptr : &*it;
}

std::string shown_shape(const std::vector<std::int64_t>& shape) { return fmt::format("({})", fmt::join(shape, ", ")); }

// A number of bytes, elements or places: an integer in [0, 2^63).
std::optional<std::uint64_t> size_in(const json& value) {
  if (!value.is_number_integer() || (!value.is_number_unsigned() && value.get<std::int64_t>() < 0)) {
    return std::nullopt;
  }
  const auto n = value.get<std::uint64_t>();
  return n <= std::uint64_t{std::numeric_limits<std::int64_t>::max()} ? std::optional(n) : std::nullopt;
}

std::string no_weights(const std::filesystem::path& folder) {
  std::error_code error;
  std::string found = "nothing";
  std::string advice;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".bin") && name.starts_with("pytorch_model")) {
      return fmt::format(
          "{}: expected {}, found {}; convert it with transformers: python -c \"from transformers import "
          "AutoModelForCausalLM as M; M.from_pretrained('{}').save_pretrained('{}')\"",
          folder.string(), kSingle, name, folder.string(), folder.string());
    }
    if (name.ends_with(".gguf") || name.ends_with(".pth") || name.ends_with(".safetensors")) {
      found = shown(std::string_view(name));
    }
  }
  return fmt::format("{}: expected {} or {}, found {}", folder.string(), kSingle, kIndex, found);
}

}  // namespace

std::int64_t Tensor::size() const {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape) {
    n *= extent;
  }
  return n;
}

struct Safetensors::Entry {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes, from the file's begin
  const File* file = nullptr;
  std::vector<std::byte> aligned;  // a copy, where the file's writer did not align the data to their element

  std::span<const std::byte> bytes() const;
};

// One mapped file and its header.
struct Safetensors::File {
  explicit File(std::filesystem::path file_path) : path(std::move(file_path)) { map(); }
  ~File() {
    if (data != nullptr) {
      ::munmap(data, size);
    }
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::map<std::string, Entry> entries() const;

  std::filesystem::path path;
  void* data = nullptr;
  std::uint64_t size = 0;

 private:
  void map();
  Entry entry(const std::string& name, const json& fields, std::uint64_t data_begin) const;
  [[noreturn]] void wrong(const std::string& what) const { throw ConfigError(path.string() + ": " + what); }
};

std::span<const std::byte> Safetensors::Entry::bytes() const {
  if (!aligned.empty()) {
    return aligned;
  }
  return {static_cast<const std::byte*>(file->data) + begin, end - begin};
}

void Safetensors::File::map() {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    wrong(fmt::format("cannot be opened: {}", std::generic_category().message(errno)));
  }
  struct stat status {};  // a pipe is opened without waiting for its writer, and refused here
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    wrong("expected a regular file");
  }
  size = static_cast<std::uint64_t>(status.st_size);
  void* mapped = size < 8 ? nullptr : ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int map_error = errno;
  ::close(fd);
  if (size < 8) {
    wrong(fmt::format("expected a safetensors file, found {} bytes; it was cut off", size));
  }
  if (mapped == MAP_FAILED) {
    wrong(fmt::format("cannot be mapped into memory: {}", std::generic_category().message(map_error)));
  }
  data = mapped;
}

std::map<std::string, Safetensors::Entry> Safetensors::File::entries() const {
  const char* bytes = static_cast<const char*>(data);
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes, 8);
  if (std::string_view(bytes, size).starts_with("version https://git-lfs")) {
    wrong("expected weights, found a Git LFS pointer; `git lfs pull` in its folder fetches them");
  }
  if (header_bytes > kMaxHeader) {
    wrong(fmt::format("expected a safetensors header of at most {} bytes, found {}", kMaxHeader, header_bytes));
  }
  if (header_bytes > size - 8) {
    wrong(fmt::format("expected {} bytes of header, found {}; the file was cut off", header_bytes, size - 8));
  }
  const json header =
      parse_object(std::string_view(bytes + 8, header_bytes), path.string() + ": header", Names::unique);

  std::map<std::string, Entry> out;
  for (const auto& [name, fields] : header.items()) {
    if (name != "__metadata__") {
      out.emplace(name, entry(name, fields, 8 + header_bytes));
    }
  }
  std::vector<const std::pair<const std::string, Entry>*> by_begin;
  for (const auto& item : out) {
    if (item.second.begin != item.second.end) {
      by_begin.push_back(&item);
    }
  }
  std::sort(by_begin.begin(), by_begin.end(), [](auto* a, auto* b) { return a->second.begin < b->second.begin; });
  for (std::size_t i = 1; i < by_begin.size(); ++i) {
    if (by_begin[i]->second.begin < by_begin[i - 1]->second.end) {
      wrong(fmt::format("the data of tensors {} and {} overlap", shown(std::string_view(by_begin[i - 1]->first)),
                        shown(std::string_view(by_begin[i]->first))));
    }
  }
  for (auto& [name, entry] : out) {  // only now: tensors that share bytes would be copied any number of times
    const Dtype* known = find_dtype(entry.dtype);
    if (known != nullptr && known->type && entry.begin % known->bytes != 0) {
      const std::span<const std::byte> source = entry.bytes();
      entry.aligned.assign(source.begin(), source.end());
    }
  }
  return out;
}

Safetensors::Entry Safetensors::File::entry(const std::string& name, const json& fields,
                                            std::uint64_t data_begin) const {
  const std::string tensor = fmt::format("tensor {}", shown(std::string_view(name)));
  const auto get = [&](const char* key) -> const json& {
    if (!fields.is_object() || !fields.contains(key)) {
      wrong(fmt::format("{}: expected dtype, shape and data_offsets, found {}", tensor, shown(fields)));
    }
    return fields.at(key);
  };
  const json &dtype = get("dtype"), &shape = get("shape"), &offsets = get("data_offsets");
  if (!dtype.is_string()) {
    wrong(fmt::format("{}: dtype: expected a string, found {}", tensor, shown(dtype)));
  }
  if (!shape.is_array() || shape.size() > kMaxRank) {
    wrong(fmt::format("{}: shape: expected a list of at most {} numbers, found {}", tensor, kMaxRank, shown(shape)));
  }
  Entry out;
  out.file = this;
  out.dtype = dtype.get<std::string>();
  std::uint64_t n = 1;
  for (const json& value : shape) {
    const auto extent = size_in(value);
    if (!extent) {
      wrong(fmt::format("{}: shape: expected whole numbers of at least 0, found {}", tensor, shown(shape)));
    }
    if (__builtin_mul_overflow(n, *extent, &n)) {
      wrong(fmt::format("{}: shape {} has more elements than can be counted", tensor, shown(shape)));
    }
    out.shape.push_back(static_cast<std::int64_t>(*extent));
  }

  const auto begin = offsets.is_array() && offsets.size() == 2 ? size_in(offsets[0]) : std::nullopt;
  const auto end = offsets.is_array() && offsets.size() == 2 ? size_in(offsets[1]) : std::nullopt;
  const std::uint64_t data_bytes = size - data_begin;
  if (!begin || !end || *begin > *end) {
    wrong(fmt::format("{}: data_offsets: expected [begin, end], found {}", tensor, shown(offsets)));
  }
  if (*end > data_bytes) {
    wrong(
        fmt::format("{}: data_offsets: expected an end of at most {} (bytes of data in the file), found {}; the file "
                    "was cut off or its header is wrong",
                    tensor, data_bytes, *end));
  }
  const Dtype* known = find_dtype(out.dtype);
  std::uint64_t expected = 0;
  if (known != nullptr && (__builtin_mul_overflow(n, known->bytes, &expected) || expected != *end - *begin)) {
    wrong(fmt::format("{}: expected {} elements of {} bytes ({} {}), found {} bytes", tensor, n, known->bytes,
                      known->name, shown_shape(out.shape), *end - *begin));
  }
  out.begin = data_begin + *begin;
  out.end = data_begin + *end;
  return out;
}

Safetensors::Safetensors(const std::filesystem::path& folder) {
  std::error_code error;
  const std::filesystem::path single = folder / kSingle, index = folder / kIndex;
  // A link that leads nowhere, as an interrupted download leaves it, is there too: opening it says so.
  if (std::filesystem::exists(std::filesystem::symlink_status(single, error))) {
    files_.push_back(std::make_unique<File>(single));
    entries_ = files_.back()->entries();
    return;
  }
  if (!std::filesystem::exists(index, error)) {
    throw ConfigError(no_weights(folder));
  }

  const json document = parse_object(read_text(index, kMaxHeader), index.string(), Names::unique);
  const auto weight_map = document.find("weight_map");
  if (weight_map == document.end() || !weight_map->is_object() || weight_map->empty()) {
    throw ConfigError(fmt::format("{}: expected an object weight_map of tensors and their files", index.string()));
  }
  std::map<std::string, std::map<std::string, Entry>> shards;
  for (const auto& [name, value] : weight_map->items()) {
    const std::string tensor = shown(std::string_view(name));
    const std::string shard = value.is_string() ? value.get<std::string>() : "";
    if (shard.empty() || shard == "." || shard == ".." || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos) {
      throw ConfigError(fmt::format("{}: tensor {}: expected the name of a file in the same folder, found {}",
                                    index.string(), tensor, shown(value)));
    }
    auto it = shards.find(shard);
    if (it == shards.end()) {
      if (!std::filesystem::exists(folder / shard, error)) {
        throw ConfigError(fmt::format("{}: tensor {} is in {}, which is not in the folder", index.string(), tensor,
                                      shown(std::string_view(shard))));
      }
      files_.push_back(std::make_unique<File>(folder / shard));
      it = shards.emplace(shard, files_.back()->entries()).first;
    }
    const auto entry = it->second.find(name);
    if (entry == it->second.end()) {
      throw ConfigError(fmt::format("{}: tensor {} is not in {}, where it should be", index.string(), tensor,
                                    shown(std::string_view(shard))));
    }
    entries_.emplace(name, std::move(entry->second));
  }
}

Safetensors::~Safetensors() = default;

bool Safetensors::has(const std::string& name) const { return entries_.count(name) > 0; }

Tensor Safetensors::tensor(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) {
    throw ConfigError(fmt::format("{}: tensor {} is missing", files_.front()->path.parent_path().string(), name));
  }
  const Entry& entry = it->second;
  const std::string where = fmt::format("{}: tensor {}", entry.file->path.string(), name);
  if (entry.shape != shape) {
    throw ConfigError(
        fmt::format("{}: expected shape {}, found {}", where, shown_shape(shape), shown_shape(entry.shape)));
  }
  const Dtype* dtype = find_dtype(entry.dtype);
  if (dtype == nullptr || !dtype->type) {
    throw ConfigError(
        fmt::format("{}: expected F32, F16 or BF16, found {}", where, shown(std::string_view(entry.dtype))));
  }
  return Tensor{entry.bytes().data(), *dtype->type, entry.shape};
}

std::vector<std::string> Safetensors::names() const {
  std::vector<std::string> out;
  for (const auto& [name, entry] : entries_) {
    out.push_back(name);
  }
  return out;
}

std::string Safetensors::fingerprint() const {
  constexpr std::size_t kEdge = 4096;
  Sha256 hash;
  for (const auto& [name, entry] : entries_) {
    const std::string head = fmt::format("{}:{} {} {}\n", name.size(), name, entry.dtype, shown_shape(entry.shape));
    const std::span<const std::byte> bytes = entry.bytes();
    const std::size_t edge = std::min(kEdge, bytes.size());
    hash.add(std::as_bytes(std::span(head)));
    hash.add(bytes.first(edge));
    hash.add(bytes.last(edge));
  }
  return "fingerprint-sha256:" + hash.hex();
}

}  // namespace kvreplay
