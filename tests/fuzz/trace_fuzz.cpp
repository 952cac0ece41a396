// A small right trace, put together item by item with the library's own calls, in which the input changes names, types,
// shapes, data, layouts, chunks and links. What the library's parser thinks of damaged bytes is trace_bytes_fuzz.cpp's.
#include <hdf5.h>
#include <zlib.h>

#include <array>
#include <cstring>
#include <map>

#include "tests/fuzz/use_trace.hpp"

using namespace kvreplay;

namespace {

using Dims = std::vector<hsize_t>;

struct Id {  // of whatever kind
  hid_t id = -1;
  explicit Id(hid_t made) : id(made) {}
  ~Id() {
    if (id >= 0) {
      H5Idec_ref(id);
    }
  }
  Id(const Id&) = delete;
  Id& operator=(const Id&) = delete;
  operator hid_t() const { return id; }  // NOLINT(google-explicit-constructor): it stands for the number in calls
};

enum class Kind { i8, u8, i16, i32, i64, u64, be32, f32, f64, bf16, fixed_text, text, compound, boolean, list, opaque };
constexpr std::size_t kKinds = 16;

hid_t make_type(Kind kind, std::size_t width) {
  switch (kind) {
    case Kind::i8:
      return H5Tcopy(H5T_STD_I8LE);
    case Kind::u8:
      return H5Tcopy(H5T_STD_U8LE);
    case Kind::i16:
      return H5Tcopy(H5T_STD_I16LE);
    case Kind::i32:
      return H5Tcopy(H5T_STD_I32LE);
    case Kind::i64:
      return H5Tcopy(H5T_STD_I64LE);
    case Kind::u64:
      return H5Tcopy(H5T_STD_U64LE);
    case Kind::be32:
      return H5Tcopy(H5T_STD_I32BE);
    case Kind::f32:
      return H5Tcopy(H5T_IEEE_F32LE);
    case Kind::f64:
      return H5Tcopy(H5T_IEEE_F64LE);
    case Kind::bf16: {
      const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
      H5Tset_fields(type, 15, 7, 8, 0, 7);
      H5Tset_precision(type, 16);
      H5Tset_size(type, 2);
      H5Tset_ebias(type, 127);
      return type;
    }
    case Kind::fixed_text: {
      const hid_t type = H5Tcopy(H5T_C_S1);
      H5Tset_size(type, std::max<std::size_t>(1, width));
      return type;
    }
    case Kind::text: {
      const hid_t type = H5Tcopy(H5T_C_S1);
      H5Tset_size(type, H5T_VARIABLE);
      return type;
    }
    case Kind::compound: {
      const hid_t type = H5Tcreate(H5T_COMPOUND, 8);
      H5Tinsert(type, "a", 0, H5T_STD_I32LE);
      H5Tinsert(type, "b", 4, H5T_IEEE_F32LE);
      return type;
    }
    case Kind::boolean: {
      const hid_t type = H5Tenum_create(H5T_STD_I8LE);
      const std::array<std::int8_t, 2> values = {0, 1};
      H5Tenum_insert(type, "FALSE", &values[0]);
      H5Tenum_insert(type, "TRUE", &values[1]);
      return type;
    }
    case Kind::list: {
      const hsize_t n = 3;
      return H5Tarray_create2(H5T_STD_I32LE, 1, &n);
    }
    case Kind::opaque:
      return H5Tcreate(H5T_OPAQUE, 5);
  }
  return -1;
}

// One attribute or dataset as it will be written.
struct Item {
  Kind kind = Kind::i64;
  Dims dims;         // empty = scalar
  std::string data;  // repeated or cut to the size of what is written; for text: the text
  bool null_space = false;
  bool unwritten = false;
  enum class Layout { contiguous, compact, chunked } layout = Layout::contiguous;
  Dims chunk, most;  // most: empty = as dims
  std::vector<int> filters;
  bool has_raw_chunk = false;  // of the first place, past the filters
  std::string raw_chunk;
  unsigned raw_mask = 0;
  std::string link;  // instead of the item: a soft link there
};

template <typename T>
std::string raw(std::initializer_list<T> values) {
  std::string out;
  for (const T value : values) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  return out;
}

constexpr hsize_t kTokens = 12;

// Path "group/name" or "group@name" to item; a map, so that the order is the same everywhere.
std::map<std::string, Item> right_trace() {
  std::map<std::string, Item> items;
  const auto integer = [&](const char* path, std::int64_t value) { items[path] = {Kind::i64, {}, raw({value})}; };
  const auto real = [&](const char* path, double value) { items[path] = {Kind::f64, {}, raw({value})}; };
  const auto text = [&](const char* path, const char* value) { items[path] = {Kind::text, {}, value}; };
  text("@format", "kvtrace");
  text("@format_version", "1.0");
  text("@provenance", "made");
  integer("@complete", 1);
  text("model@name", "raw");
  text("model@config_json", "{\"a\": [1, 2]}");
  integer("model@n_layers", 4);
  integer("model@n_heads", 4);
  integer("model@n_kv_heads", 2);
  integer("model@head_dim", 4);
  integer("model@v_head_dim", 2);
  real("model@attention_scale", 0.5);
  real("model@logit_softcap", 0);
  items["model@sliding_window"] = {Kind::i32, {4}, raw<std::int32_t>({0, 3, 0, 0})};
  text("model/rope@style", "half");
  integer("model/rope@rotary_dim", 4);
  items["model/rope@inv_freq"] = {Kind::f64, {2}, raw({1.0, 0.1})};
  const std::string numbers = raw<std::int32_t>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  items["tokens/id"] = {Kind::i32, {kTokens}, numbers};
  items["tokens/position"] = {Kind::i32, {kTokens}, numbers};
  items["tokens/phase"] = {Kind::u8, {kTokens}, raw<std::uint8_t>({0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1})};
  items["tokens/logprob"] = {Kind::f32, {kTokens}, raw({-0.5F})};
  items["tokens/piece"] = {Kind::text, {kTokens}, "piece"};
  items["tokens/spans/name"] = {Kind::text, {1}, "needle"};
  items["tokens/spans/begin"] = {Kind::i32, {1}, raw<std::int32_t>({2})};
  items["tokens/spans/end"] = {Kind::i32, {1}, raw<std::int32_t>({4})};
  items["n_valid"] = {Kind::u64, {}, raw<std::uint64_t>({kTokens})};
  for (const char* layer : {"layers/000/", "layers/003/"}) {
    const std::string at = layer;
    items[at + "k"] = {Kind::f32, {2, kTokens, 4}, raw({0.5F, 1.0F, -1.0F})};
    items[at + "v"] = {Kind::f32, {2, kTokens, 2}, raw({0.25F, 2.0F})};
    if (at == "layers/003/") {
      break;
    }
    items[at + "q"] = {Kind::f32, {4, 7, 4}, raw({1.0F, 0.5F})};
    items[at + "q_index"] = {Kind::i32, {7}, raw<std::int32_t>({5, 6, 7, 8, 9, 10, 11})};
    items[at + "out"] = {Kind::f32, {4, 2, 2}, raw({1.0F})};
    items[at + "out_index"] = {Kind::i32, {2}, raw<std::int32_t>({6, 11})};
    items[at + "w_o"] = {Kind::f32, {3, 8}, raw({1.0F})};
    items[at + "scores/magic"] = {Kind::f32, {2, kTokens}, raw({1.0F})};
  }
  return items;
}

hsize_t extent_from(fuzz::Input& input) {
  constexpr hsize_t kEdges[] = {0,
                                1,
                                2,
                                3,
                                4,
                                11,
                                12,
                                13,
                                1000,
                                1 << 16,
                                1 << 20,
                                1U << 24,
                                1U << 31,
                                0x7ffffffe,
                                0xffffffff,
                                0x100000000,
                                1 << 12,
                                1 << 13,
                                hsize_t{1} << 40,
                                hsize_t{1} << 60,
                                hsize_t{1} << 62,
                                ~hsize_t{0} - 1};
  const std::uint8_t kind = input.byte();
  return kind < 128 ? kind % 20U : kEdges[kind % 22];
}

Dims dims_from(fuzz::Input& input, std::size_t most) {
  Dims dims(input.below(most + 1));
  for (hsize_t& dim : dims) {
    dim = extent_from(input);
  }
  return dims;
}

// What zlib makes of many zeros: a chunk that inflates far beyond its size.
std::string bomb() {
  static const std::string made = [] {
    const std::vector<Bytef> zeros(std::size_t{4} << 20, 0);
    uLongf n = ::compressBound(zeros.size());
    std::string out(n, '\0');
    ::compress2(reinterpret_cast<Bytef*>(out.data()), &n, zeros.data(), zeros.size(), 9);
    out.resize(n);
    return out;
  }();
  return made;
}

void change(std::map<std::string, Item>& items, fuzz::Input& input) {
  auto at = std::next(items.begin(), static_cast<std::ptrdiff_t>(input.below(items.size())));
  Item& item = at->second;
  switch (input.below(14)) {
    case 0:
      items.erase(at);
      break;
    case 1:
      item.kind = static_cast<Kind>(input.below(kKinds));
      break;
    case 2:
      item.dims = dims_from(input, 4);
      break;
    case 3:
      if (!item.dims.empty()) {
        item.dims[input.below(item.dims.size())] = extent_from(input);
      }
      break;
    case 4:
    case 5:
      item.data = input.text(1 + input.below(24));
      break;
    case 6:
      item.layout = static_cast<Item::Layout>(input.below(3));
      item.chunk = dims_from(input, 4);
      item.filters.clear();
      for (std::size_t n = input.below(4); n > 0; --n) {
        item.filters.push_back(1 + static_cast<int>(input.below(6)));
      }
      break;
    case 7: {  // chunks that fit
      item.layout = Item::Layout::chunked;
      item.chunk = item.dims;
      for (hsize_t& dim : item.chunk) {
        dim = std::max<hsize_t>(1, dim / (1 + input.below(3)));
      }
      item.filters = input.flag() ? std::vector<int>{H5Z_FILTER_SHUFFLE, H5Z_FILTER_DEFLATE}
                                  : std::vector<int>{H5Z_FILTER_DEFLATE};
      break;
    }
    case 8:
      item.has_raw_chunk = true;
      item.raw_chunk = input.flag() ? bomb() : input.text(1 + input.below(64));
      item.raw_mask = input.byte() > 200 ? input.byte() : 0;
      break;
    case 9:
      item.most = item.dims;
      for (hsize_t& dim : item.most) {
        dim = input.flag() ? H5S_UNLIMITED : dim;
      }
      break;
    case 10:
      item.unwritten = true;
      item.null_space = input.byte() > 240;
      break;
    case 11: {  // the same under another name
      constexpr const char* kPlaces[] = {"",       "model",      "model/rope",        "tokens",     "tokens/spans",
                                         "layers", "layers/000", "layers/000/scores", "layers/001", "layers/9",
                                         "types"};
      const std::string place = input.pick(kPlaces), name = input.text(1 + input.below(10));
      const bool attribute = input.flag();
      if (name.find('\0') == std::string::npos && name.find('/') == std::string::npos && name != ".") {
        items[place + (attribute ? "@" : place.empty() ? "" : "/") + name] = item;
      }
      break;
    }
    case 12:
      item.link = input.pick({"/tokens/id", "/layers/000/k", "/layers", "/nowhere", "/layers/000/scores/magic"});
      break;
    case 13:
      if (!item.data.empty()) {
        item.data[input.below(item.data.size())] = static_cast<char>(input.byte());
      }
      break;
  }
}

std::vector<const char*> pointers(const Item& item, std::size_t n) { return {n, item.data.c_str()}; }

// Nothing that the library refuses to make is an error here: the item is simply not there.
void write_item(hid_t file, const std::string& path, const Item& item) {
  const std::size_t mark = path.find('@');
  const bool attribute = mark != std::string::npos;
  const std::string group =
      attribute ? path.substr(0, mark) : path.substr(0, path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  const std::string name = path.substr(attribute ? mark + 1 : group.empty() ? 0 : group.size() + 1);
  const Id links(H5Pcreate(H5P_LINK_CREATE));
  H5Pset_create_intermediate_group(links, 1);
  if (!group.empty() && H5Lexists(file, group.substr(0, group.find('/')).c_str(), H5P_DEFAULT) <= 0) {
    const Id made(H5Gcreate2(file, group.c_str(), links, H5P_DEFAULT, H5P_DEFAULT));
  } else if (!group.empty()) {
    const Id made(H5Gcreate2(file, group.c_str(), links, H5P_DEFAULT, H5P_DEFAULT));
  }
  const Id parent(group.empty() ? H5Gopen2(file, "/", H5P_DEFAULT) : H5Gopen2(file, group.c_str(), H5P_DEFAULT));
  if (parent < 0) {
    return;
  }
  if (!item.link.empty()) {
    if (item.link == "/layers/000/scores/magic") {
      H5Lcreate_hard(file, item.link.c_str(), parent, name.c_str(), links, H5P_DEFAULT);
    } else {
      H5Lcreate_soft(item.link.c_str(), parent, name.c_str(), links, H5P_DEFAULT);
    }
    return;
  }
  const Id type(make_type(item.kind, item.data.size()));
  const Id space(item.null_space ? H5Screate(H5S_NULL)
                 : item.dims.empty()
                     ? H5Screate(H5S_SCALAR)
                     : H5Screate_simple(static_cast<int>(item.dims.size()), item.dims.data(),
                                        item.most.size() == item.dims.size() ? item.most.data() : nullptr));
  if (type < 0 || space < 0) {
    return;
  }
  const hssize_t extent = H5Sget_simple_extent_npoints(space);
  const std::size_t n = extent < 0 ? 0 : static_cast<std::size_t>(extent), width = H5Tget_size(type);
  constexpr std::size_t kMostBytes = std::size_t{1} << 18;
  const bool writable = !item.unwritten && n > 0 && n <= kMostBytes / std::max<std::size_t>(width, 1);
  std::string data;
  std::vector<const char*> texts;
  const void* from = nullptr;
  if (writable && item.kind == Kind::text) {
    texts = pointers(item, n);
    from = texts.data();
  } else if (writable) {
    data.assign(n * width, '\0');
    for (std::size_t i = 0; i < data.size() && !item.data.empty(); ++i) {
      data[i] = item.data[i % item.data.size()];
    }
    from = data.data();
  }
  if (attribute) {
    if (n * width > kMostBytes) {
      return;
    }
    const Id made(H5Acreate2(parent, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT));
    if (made >= 0 && from != nullptr) {
      H5Awrite(made, type, from);
    }
    return;
  }
  const Id creation(H5Pcreate(H5P_DATASET_CREATE));
  if (item.layout == Item::Layout::compact) {
    H5Pset_layout(creation, H5D_COMPACT);
  } else if (item.layout == Item::Layout::chunked && !item.chunk.empty()) {
    double bytes = static_cast<double>(width);
    for (const hsize_t dim : item.chunk) {
      bytes *= static_cast<double>(dim);
    }
    H5Pset_chunk(creation, static_cast<int>(item.chunk.size()), item.chunk.data());
    for (const int filter : item.filters) {
      if (filter == H5Z_FILTER_DEFLATE) {
        H5Pset_deflate(creation, 1);
      } else if (filter == H5Z_FILTER_SHUFFLE) {
        H5Pset_shuffle(creation);
      } else if (filter == H5Z_FILTER_FLETCHER32) {
        H5Pset_fletcher32(creation);
      } else if (filter == H5Z_FILTER_NBIT) {
        H5Pset_nbit(creation);
      }
    }
    if (bytes > static_cast<double>(std::size_t{1} << 22)) {  // the library would fill such a chunk to write into it
      from = nullptr;
    }
  }
  const Id made(H5Dcreate2(parent, name.c_str(), type, space, links, creation, H5P_DEFAULT));
  if (made < 0) {
    return;
  }
  if (from != nullptr) {
    H5Dwrite(made, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, from);
  }
  if (item.has_raw_chunk && item.layout == Item::Layout::chunked) {
    const Dims origin(std::max<std::size_t>(1, item.dims.size()), 0);
    H5Dwrite_chunk(made, H5P_DEFAULT, item.raw_mask, origin.data(), item.raw_chunk.size(), item.raw_chunk.data());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  fuzz::Input input(data, size);
  const bool oldest = input.flag(), repacks = input.below(8) == 1;
  std::map<std::string, Item> items = right_trace();
  for (int n = 0; n < 12 && !input.empty() && !items.empty(); ++n) {
    change(items, input);
  }
  const std::filesystem::path path = fuzz::scratch() / "in.h5";
  {
    const Id access(H5Pcreate(H5P_FILE_ACCESS));
    H5Pset_libver_bounds(access, oldest ? H5F_LIBVER_EARLIEST : H5F_LIBVER_V18, H5F_LIBVER_V110);
    H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
    const Id file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access));
    fuzz::require(file >= 0, "the scratch file cannot be made");
    for (const auto& [where, item] : items) {
      write_item(file, where, item);
    }
  }
  H5Eclear2(H5E_DEFAULT);
  fuzz::use_trace(path, repacks);
  return 0;
}
