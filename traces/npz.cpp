#include "traces/npz.hpp"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "traces/inflate.hpp"
#include "traces/limits.hpp"

namespace kvreplay {
namespace {

constexpr std::uint64_t kMaxDirectory = std::uint64_t{64} << 20;
constexpr std::uint64_t kLocal = 30;  // bytes of an entry's own header, at least

// Little-endian fields of the zip format.
template <typename T>
T field(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

struct Directory {
  std::uint64_t offset = 0, bytes = 0, n_entries = 0;
};

Directory find_directory(const FileBytes& file, const std::string& path) {
  constexpr std::uint64_t kEnd = 22, kMaxComment = 65535, kLocator = 20, kEnd64 = 56;
  const std::uint64_t n = std::min(file.size(), kEnd + kMaxComment + kLocator);
  std::vector<std::byte> tail(n);
  file.read(file.size() - n, tail);
  for (std::uint64_t at = n < kEnd ? 0 : n - kEnd + 1; at-- > 0;) {
    if (field<std::uint32_t>(tail, at) != 0x06054b50U) {
      continue;
    }
    Directory found{field<std::uint32_t>(tail, at + 16), field<std::uint32_t>(tail, at + 12),
                    field<std::uint16_t>(tail, at + 10)};
    const bool large = found.offset == 0xffffffffU || found.bytes == 0xffffffffU || found.n_entries == 0xffffU;
    if (large && at >= kLocator && field<std::uint32_t>(tail, at - kLocator) == 0x07064b50U) {
      const auto end64 = field<std::uint64_t>(tail, at - kLocator + 8);
      if (file.size() < kEnd64 || end64 > file.size() - kEnd64) {
        break;
      }
      std::vector<std::byte> record(kEnd64);
      file.read(end64, record);
      if (field<std::uint32_t>(record, 0) != 0x06064b50U) {
        break;
      }
      found = {field<std::uint64_t>(record, 48), field<std::uint64_t>(record, 40), field<std::uint64_t>(record, 32)};
    }
    if (found.bytes > kMaxDirectory || found.offset > file.size() || found.bytes > file.size() - found.offset) {
      break;
    }
    return found;
  }
  throw TraceError(path + ": expected an .npz file (a zip archive), found none or a damaged one");
}

// What the header of an .npy file says: {'descr': '<f2', 'fortran_order': False, 'shape': (8, 2048,
// 64), }
std::string text_after(const std::string& header, const std::string& key, const std::string& where) {
  const std::size_t at = header.find("'" + key + "'");
  const std::size_t colon = at == std::string::npos ? at : header.find(':', at);
  if (colon == std::string::npos) {
    throw TraceError(where + ": its .npy header has no '" + key + "'");
  }
  const std::size_t begin = header.find_first_not_of(' ', colon + 1);
  return begin == std::string::npos ? "" : header.substr(begin);
}

std::vector<std::uint64_t> parse_shape(const std::string& text, const std::string& where) {
  const std::size_t close = text.find(')');
  if (text.empty() || text[0] != '(' || close == std::string::npos) {
    throw TraceError(where + ": its .npy header has no readable shape");
  }
  std::vector<std::uint64_t> shape;
  const char* at = text.data() + 1;
  const char* const end = text.data() + close;
  while (at < end) {
    if (*at == ' ' || *at == ',') {
      ++at;
      continue;
    }
    std::uint64_t dim = 0;
    const auto [next, error] = std::from_chars(at, end, dim);
    if (error != std::errc() || shape.size() == 8) {
      throw TraceError(where + ": its .npy header has no readable shape");
    }
    shape.push_back(dim);
    at = next;
  }
  return shape;
}

}  // namespace

Npz::Npz(const std::filesystem::path& path) : path_(path) {
  if (std::error_code error; !std::filesystem::is_regular_file(path, error)) {
    throw TraceError(path.string() + ": expected an .npz file, found none");
  }
  file_ = std::make_unique<const FileBytes>(path);
  const Directory directory = find_directory(*file_, path.string());
  std::vector<std::byte> bytes(directory.bytes);
  file_->read(directory.offset, bytes);
  const auto damaged = [&] { return TraceError(path.string() + ": its zip directory is damaged"); };
  std::size_t at = 0;
  for (std::uint64_t i = 0; i < directory.n_entries; ++i) {
    constexpr std::size_t kHeader = 46;
    if (bytes.size() - at < kHeader || field<std::uint32_t>(bytes, at) != 0x02014b50U) {
      throw damaged();
    }
    const auto flags = field<std::uint16_t>(bytes, at + 8);
    const std::size_t n_name = field<std::uint16_t>(bytes, at + 28), n_extra = field<std::uint16_t>(bytes, at + 30),
                      n_comment = field<std::uint16_t>(bytes, at + 32);
    if (bytes.size() - at - kHeader < n_name + n_extra + n_comment) {
      throw damaged();
    }
    std::string name(reinterpret_cast<const char*>(bytes.data() + at + kHeader), n_name);
    Entry entry{field<std::uint32_t>(bytes, at + 42), field<std::uint32_t>(bytes, at + 20),
                field<std::uint32_t>(bytes, at + 24), field<std::uint32_t>(bytes, at + 16),
                field<std::uint16_t>(bytes, at + 10)};
    // Sizes beyond 32 bits stand in extra field 1, in this order, only where the short field is
    // full.
    for (std::size_t e = at + kHeader + n_name, end = e + n_extra; e + 4 <= end;) {
      const std::size_t id = field<std::uint16_t>(bytes, e), n = field<std::uint16_t>(bytes, e + 2);
      if (n > end - e - 4) {
        throw damaged();
      }
      if (id == 1) {
        std::size_t next = e + 4;
        for (std::uint64_t* value : {&entry.bytes, &entry.stored_bytes, &entry.offset}) {
          if (*value == 0xffffffffU && next + 8 <= e + 4 + n) {
            *value = field<std::uint64_t>(bytes, next);
            next += 8;
          }
        }
      }
      e += 4 + n;
    }
    at += kHeader + n_name + n_extra + n_comment;
    const std::string where = path.string() + ": " + name;
    if ((flags & 1U) != 0 || (entry.method != 0 && entry.method != 8)) {
      throw TraceError(where + ": is encrypted or compressed in a way that NumPy does not use");
    }
    if (entry.offset > file_->size() || entry.stored_bytes > file_->size() - entry.offset ||
        (entry.method == 0 && entry.bytes != entry.stored_bytes) ||
        entry.bytes / limits::kMaxInflation > entry.stored_bytes) {
      throw TraceError(fmt::format("{}: claims {} bytes from {} at byte {} of a file of {}", where, entry.bytes,
                                   entry.stored_bytes, entry.offset, file_->size()));
    }
    if (!name.ends_with(".npy")) {
      throw TraceError(where + ": is not an .npy array");
    }
    name.resize(name.size() - 4);
    if (!entries_.emplace(name, entry).second) {
      throw TraceError(where + ": appears twice");
    }
  }
  check_entries();
}

// Entries that share bytes, or that stand for far more than the file holds, are how a zip archive becomes a bomb.
void Npz::check_entries() const {
  std::vector<std::pair<Entry, std::string>> by_offset;
  const std::uint64_t most = limits::kArrays.of(file_->size());
  std::uint64_t bytes = 0;
  for (const auto& [name, entry] : entries_) {
    by_offset.emplace_back(entry, name);
    if (entry.bytes > most - bytes) {
      throw TraceError(fmt::format("{}: its arrays stand for more than {} bytes, which a file of {} bytes may not",
                                   path_.string(), most, file_->size()));
    }
    bytes += entry.bytes;
  }
  std::sort(by_offset.begin(), by_offset.end(),
            [](const auto& a, const auto& b) { return a.first.offset < b.first.offset; });
  for (std::size_t i = 1; i < by_offset.size(); ++i) {
    const Entry& before = by_offset[i - 1].first;
    if (before.stored_bytes + kLocal > by_offset[i].first.offset - before.offset) {
      throw TraceError(fmt::format("{}: the arrays '{}' and '{}' overlap at byte {}", path_.string(),
                                   by_offset[i - 1].second, by_offset[i].second, by_offset[i].first.offset));
    }
  }
}

std::vector<std::string> Npz::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries_) {
    names.push_back(name);
  }
  return names;
}

std::vector<std::byte> Npz::contents(const std::string& name) const {
  const std::string where = path_.string() + ": " + name;
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    throw TraceError(
        fmt::format("{}: the array '{}' is missing; it has {}", path_.string(), name, fmt::join(names(), ", ")));
  }
  const Entry& entry = found->second;
  std::vector<std::byte> header(kLocal);
  if (file_->size() - entry.offset < kLocal) {
    throw TraceError(where + ": its zip header is damaged");
  }
  file_->read(entry.offset, header);
  const std::uint64_t begin =
      entry.offset + kLocal + field<std::uint16_t>(header, 26) + field<std::uint16_t>(header, 28);
  if (field<std::uint32_t>(header, 0) != 0x04034b50U || begin > file_->size() ||
      entry.stored_bytes > file_->size() - begin) {
    throw TraceError(where + ": its zip header is damaged");
  }
  std::vector<std::byte> stored(entry.stored_bytes);
  file_->read(begin, stored);
  std::vector<std::byte> out;
  if (entry.method == 0) {
    out = std::move(stored);
  } else {
    out.resize(entry.bytes);
    if (!inflate_exactly(stored, out, Deflated::raw)) {
      throw TraceError(fmt::format("{}: does not inflate to its {} bytes; the file is damaged", where, out.size()));
    }
  }
  uLong crc = ::crc32(0, nullptr, 0);
  crc = ::crc32_z(crc, reinterpret_cast<const Bytef*>(out.data()), out.size());
  if (crc != entry.crc) {
    throw TraceError(where + ": its checksum does not match; the file is damaged");
  }
  return out;
}

NpyArray Npz::load(const std::string& name) const {
  std::vector<std::byte> bytes = contents(name);
  NpyArray array;
  array.where = path_.filename().string() + ": " + name;
  if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0) {
    throw TraceError(array.where + ": is not an .npy array");
  }
  const int version = std::to_integer<int>(bytes[6]);
  const std::size_t n_length = version == 1 ? 2 : 4;
  const std::size_t n_header = version == 1 ? field<std::uint16_t>(bytes, 8) : field<std::uint32_t>(bytes, 8);
  const std::size_t begin = 8 + n_length + n_header;
  if (version < 1 || version > 3 || n_header > 65536 || begin > bytes.size()) {
    throw TraceError(array.where + ": its .npy header is damaged");
  }
  const std::string header(reinterpret_cast<const char*>(bytes.data() + 8 + n_length), n_header);
  const std::string descr = text_after(header, "descr", array.where);
  const std::size_t quote = descr.size() > 1 ? descr.find('\'', 1) : std::string::npos;
  if (descr.empty() || descr[0] != '\'' || quote == std::string::npos || quote < 4) {
    throw TraceError(array.where + ": is not an array of plain numbers");
  }
  const char order = descr[1];
  array.kind = descr[2];
  const auto [end, error] = std::from_chars(descr.data() + 3, descr.data() + quote, array.item_bytes);
  const bool sized = error == std::errc() && end == descr.data() + quote &&
                     (array.item_bytes == 1 || array.item_bytes == 2 || array.item_bytes == 4 || array.item_bytes == 8);
  if (!sized || std::string_view("fiubV").find(array.kind) == std::string_view::npos ||
      (order != '<' && order != '|')) {
    throw TraceError(array.where + ": has NumPy type " + descr.substr(0, quote + 1) +
                     ", but little-endian floats or integers are expected");
  }
  if (!text_after(header, "fortran_order", array.where).starts_with("False")) {
    throw TraceError(array.where + ": is in Fortran order; save np.ascontiguousarray of it");
  }
  array.shape = parse_shape(text_after(header, "shape", array.where), array.where);
  std::uint64_t expected = array.item_bytes;
  for (const std::uint64_t dim : array.shape) {
    if (dim != 0 && expected > std::numeric_limits<std::uint64_t>::max() / dim) {
      throw TraceError(array.where + ": its shape is absurd");
    }
    expected *= dim;
  }
  if (expected != bytes.size() - begin) {
    throw TraceError(fmt::format("{}: shape ({}) needs {} bytes, found {}", array.where, fmt::join(array.shape, ", "),
                                 expected, bytes.size() - begin));
  }
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(begin));
  array.data = std::move(bytes);
  return array;
}

std::uint64_t NpyArray::n_elements() const { return data.size() / item_bytes; }

std::vector<std::int64_t> NpyArray::integers() const {
  if (kind != 'i' && kind != 'u' && kind != 'b') {
    throw TraceError(where + ": integers are expected, found NumPy kind '" + std::string(1, kind) + "'");
  }
  std::vector<std::int64_t> values(n_elements());
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, data.data() + i * item_bytes, item_bytes);
    const unsigned unused = static_cast<unsigned>(64 - 8 * item_bytes);
    if (kind == 'i') {
      values[i] = static_cast<std::int64_t>(bits << unused) >> unused;  // sign extension
    } else if (bits > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      throw TraceError(fmt::format("{}: the integer {} does not fit", where, bits));
    } else {
      values[i] = static_cast<std::int64_t>(bits);
    }
  }
  return values;
}

ElementType NpyArray::element() const {
  if (kind == 'f' && item_bytes == 2) {
    return ElementType::f16;
  }
  if ((kind == 'V' || kind == 'u') && item_bytes == 2) {
    return ElementType::bf16;
  }
  if (kind == 'f' && item_bytes >= 4) {
    return ElementType::f32;
  }
  throw TraceError(
      fmt::format("{}: has NumPy type {}{}; allowed are float16, float32, float64, and uint16 or V2 "
                  "holding bfloat16",
                  where, kind, item_bytes));
}

std::vector<float> NpyArray::floats() const {
  const ElementType type = element();
  std::vector<float> values(n_elements());
  bool finite = true;
  if (item_bytes == 8) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      double value = 0;
      std::memcpy(&value, data.data() + i * 8, 8);
      values[i] = static_cast<float>(value);
      finite = finite && std::isfinite(values[i]);
    }
  } else {
    finite = widen(type, data.data(), values);
  }
  if (!finite) {
    const auto bad = std::find_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
    std::uint64_t rest = static_cast<std::uint64_t>(bad - values.begin());
    std::vector<std::uint64_t> index(shape.size());
    for (std::size_t d = shape.size(); d-- > 0;) {
      index[d] = rest % shape[d];
      rest /= shape[d];
    }
    throw TraceError(fmt::format("{}: expected finite values, found {} at [{}]", where, *bad, fmt::join(index, ", ")));
  }
  return values;
}

}  // namespace kvreplay
