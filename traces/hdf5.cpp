#include "traces/hdf5.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>
#include <system_error>

#include "traces/inflate.hpp"
#include "traces/limits.hpp"

namespace kvreplay::hdf5 {
namespace {

static_assert(sizeof(hid_t) == sizeof(std::int64_t));

// After a failed flush the library's own clean-up at exit would crash (HDF5 1.10). It has to be told before its first
// use, hence before main; files are closed by their owners.
[[maybe_unused]] const herr_t kNoExitHandler = H5dont_atexit();

// The library prints its error stack per thread unless told otherwise.
void silence() {
  static thread_local bool done = false;
  if (!done) {
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    done = true;
  }
}

herr_t first_message(unsigned n, const H5E_error2_t* error, void* out) {
  auto& text = *static_cast<std::string*>(out);
  if (n == 0 || text.empty()) {
    text = error->desc == nullptr ? "" : error->desc;
  }
  return 0;
}

[[noreturn]] void fail(const std::string& context) {
  std::string reason;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first_message, &reason);
  H5Eclear2(H5E_DEFAULT);
  // A failed system call comes with a paragraph of internals; its error text says it all.
  const std::string mark = "error message = '";
  if (const auto begin = reason.find(mark); begin != std::string::npos) {
    const auto from = begin + mark.size();
    reason = reason.substr(from, reason.find('\'', from) - from);
  }
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  throw StorageError(reason.empty() ? context : context + " (" + reason + ")");
}

// Every C call goes through here: a negative result is a StorageError with the caller's context.
template <typename Call>
auto checked(const std::string& context, Call&& call) {
  silence();
  const auto result = call();
  if (result < 0) {
    fail(context);
  }
  return result;
}

template <typename Call>
Handle handle(const std::string& context, Call&& call) {
  return Handle(checked(context, call));
}

Handle make_bfloat16() {
  Handle type = handle("cannot make the bfloat16 type", [] { return H5Tcopy(H5T_IEEE_F32LE); });
  const hid_t id = type.get();
  // Fields first, then the smaller precision: the library refuses a precision that would cut a
  // field.
  checked("cannot make the bfloat16 type", [&] { return H5Tset_fields(id, 15, 7, 8, 0, 7); });
  checked("cannot make the bfloat16 type", [&] { return H5Tset_precision(id, 16); });
  checked("cannot make the bfloat16 type", [&] { return H5Tset_size(id, 2); });
  checked("cannot make the bfloat16 type", [&] { return H5Tset_ebias(id, 127); });
  return type;
}

Handle make_float16() {
  Handle type = handle("cannot make the float16 type", [] { return H5Tcopy(H5T_IEEE_F32LE); });
  const hid_t id = type.get();
  checked("cannot make the float16 type", [&] { return H5Tset_fields(id, 15, 10, 5, 0, 10); });
  checked("cannot make the float16 type", [&] { return H5Tset_precision(id, 16); });
  checked("cannot make the float16 type", [&] { return H5Tset_size(id, 2); });
  checked("cannot make the float16 type", [&] { return H5Tset_ebias(id, 15); });
  return type;
}

Handle copy_of(hid_t id) {
  return handle("cannot copy a type", [&] { return H5Tcopy(id); });
}

Handle make_type(Type type) {
  silence();
  switch (type) {
    case Type::f16:
      return make_float16();
    case Type::bf16:
      return make_bfloat16();
    case Type::f32:
      return copy_of(H5T_IEEE_F32LE);
    case Type::f64:
      return copy_of(H5T_IEEE_F64LE);
    case Type::i8:
      return copy_of(H5T_STD_I8LE);
    case Type::i16:
      return copy_of(H5T_STD_I16LE);
    case Type::i32:
      return copy_of(H5T_STD_I32LE);
    case Type::i64:
      return copy_of(H5T_STD_I64LE);
    case Type::u8:
      return copy_of(H5T_STD_U8LE);
    case Type::u16:
      return copy_of(H5T_STD_U16LE);
    case Type::u32:
      return copy_of(H5T_STD_U32LE);
    case Type::u64:
      return copy_of(H5T_STD_U64LE);
    case Type::text:
    case Type::other:
      break;
  }
  throw StorageError("a dataset cannot be created with this element type");
}

// Fixed length, null padded: such text lives inside the object header or the data, both of which
// are checked or hashed; variable-length text would live in a heap that is neither.
Handle make_text_type(std::size_t bytes) {
  Handle type = handle("cannot make a text type", [] { return H5Tcopy(H5T_C_S1); });
  checked("cannot make a text type", [&] { return H5Tset_size(type.get(), std::max<std::size_t>(bytes, 1)); });
  checked("cannot make a text type", [&] { return H5Tset_strpad(type.get(), H5T_STR_NULLPAD); });
  checked("cannot make a text type", [&] { return H5Tset_cset(type.get(), H5T_CSET_UTF8); });
  return type;
}

bool has_fields(hid_t type, std::size_t sign, std::size_t exp_pos, std::size_t exp_size, std::size_t man_size,
                std::size_t bias) {
  std::size_t s = 0, e = 0, es = 0, m = 0, ms = 0;
  return H5Tget_fields(type, &s, &e, &es, &m, &ms) >= 0 && s == sign && e == exp_pos && es == exp_size && m == 0 &&
         ms == man_size && H5Tget_ebias(type) == bias && H5Tget_offset(type) == 0 &&
         H5Tget_norm(type) == H5T_NORM_IMPLIED && H5Tget_order(type) == H5T_ORDER_LE;
}

Type classify(hid_t type) {
  silence();
  const std::size_t size = H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_STRING:
      return Type::text;
    case H5T_FLOAT:
      if (size == 2 && has_fields(type, 15, 10, 5, 10, 15)) {
        return Type::f16;
      }
      if (size == 2 && has_fields(type, 15, 7, 8, 7, 127)) {
        return Type::bf16;
      }
      if (size == 4 && has_fields(type, 31, 23, 8, 23, 127)) {
        return Type::f32;
      }
      if (size == 8 && has_fields(type, 63, 52, 11, 52, 1023)) {
        return Type::f64;
      }
      return Type::other;
    case H5T_INTEGER: {
      if (H5Tget_precision(type) != 8 * size || (size > 1 && H5Tget_order(type) != H5T_ORDER_LE)) {
        return Type::other;
      }
      const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
      switch (size) {
        case 1:
          return is_signed ? Type::i8 : Type::u8;
        case 2:
          return is_signed ? Type::i16 : Type::u16;
        case 4:
          return is_signed ? Type::i32 : Type::u32;
        case 8:
          return is_signed ? Type::i64 : Type::u64;
        default:
          return Type::other;
      }
    }
    default:
      return Type::other;
  }
}

Shape shape_of_space(hid_t space, const std::string& where) {
  const H5S_class_t kind = H5Sget_simple_extent_type(space);
  if (kind == H5S_SCALAR) {
    return {};
  }
  if (kind != H5S_SIMPLE) {
    throw StorageError(where + " has a null dataspace, but it must hold data");
  }
  const int rank = checked(where + ": cannot read its shape", [&] { return H5Sget_simple_extent_ndims(space); });
  Shape shape(static_cast<std::size_t>(rank));
  static_assert(sizeof(hsize_t) == sizeof(std::uint64_t));
  std::vector<hsize_t> dims(shape.size());
  checked(where + ": cannot read its shape", [&] { return H5Sget_simple_extent_dims(space, dims.data(), nullptr); });
  std::copy(dims.begin(), dims.end(), shape.begin());
  return shape;
}

Handle make_space(const Shape& shape) {
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  return handle("cannot make the dataspace " + to_string(shape), [&] {
    return dims.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
  });
}

// One element of fixed-length text up to its padding.
std::string trimmed(const char* text, std::size_t size) {
  return std::string(text, std::find(text, text + size, '\0'));
}

template <typename T>
T field(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

// Objects of a global heap collection must lie within it; HDF5 1.10 takes their sizes on trust and
// crashes.
bool is_sound_heap(std::span<const std::byte> heap) {
  constexpr std::size_t kHeader = 16;
  for (std::size_t at = kHeader; heap.size() - at >= kHeader;) {
    const auto index = field<std::uint16_t>(heap, at);
    const auto bytes = field<std::uint64_t>(heap, at + 8);
    const std::uint64_t left = heap.size() - at;
    // Free space is the last, counts its own header and reaches to the end: from a shorter one HDF5
    // reads on, and never stops where the next size is zero.
    if (index == 0) {
      return bytes == left;
    }
    if (bytes > left - kHeader || (bytes + 7) / 8 * 8 > left - kHeader) {
      return false;
    }
    at += kHeader + (bytes + 7) / 8 * 8;
  }
  return true;
}

// Variable-length texts live in global heaps, the one place of a file that carries no checksum.
// Finds and checks all of them before the library reads the first; contiguous data, which holds
// most of a file, is stepped over.
void check_heaps(hid_t object, const std::string& where) {
  const Handle file = handle(where + " has no file", [&] { return H5Iget_file_id(object); });
  H5O_info_t object_info{};
  checked(where + " cannot be examined", [&] { return H5Oget_info2(object, &object_info, H5O_INFO_BASIC); });
  const unsigned long number = object_info.fileno;  // every open of a file has its own
  static thread_local unsigned long last_checked = 0;
  if (number == last_checked) {
    return;
  }
  char name[4096] = "";
  checked(where + " has no file name", [&] { return H5Fget_name(file.get(), name, sizeof(name)); });

  std::vector<Extent> bulk;
  const auto add = [](hid_t root, const char* path, const H5O_info_t* info, void* out) -> herr_t {
    if (info->type == H5O_TYPE_DATASET) {
      const Handle dataset(H5Dopen2(root, path, H5P_DEFAULT));
      const haddr_t offset = dataset.get() < 0 ? HADDR_UNDEF : H5Dget_offset(dataset.get());
      if (offset != HADDR_UNDEF) {
        static_cast<std::vector<Extent>*>(out)->push_back({offset, H5Dget_storage_size(dataset.get())});
      }
    }
    return 0;
  };
  checked(where + ": the file's members cannot be listed",
          [&] { return H5Ovisit2(file.get(), H5_INDEX_NAME, H5_ITER_NATIVE, add, &bulk, H5O_INFO_BASIC); });
  std::sort(bulk.begin(), bulk.end(), [](const Extent& a, const Extent& b) { return a.offset < b.offset; });

  std::ifstream in(name, std::ios::binary);
  const std::uint64_t size = std::filesystem::file_size(name);
  constexpr std::string_view kSignature = "GCOL\x01\0\0\0";
  constexpr std::uint64_t kPiece = std::uint64_t{1} << 20, kHeader = 16;
  std::vector<char> piece;
  auto next = bulk.begin();
  for (std::uint64_t at = 0; at + kHeader <= size;) {
    while (next != bulk.end() && next->offset <= at) {
      at = next->offset + next->bytes > at && next->bytes <= size ? next->offset + next->bytes : at;
      ++next;
    }
    const std::uint64_t end = std::min({size, at + kPiece, next == bulk.end() ? size : next->offset});
    if (at >= end) {
      continue;
    }
    piece.resize(std::min(size, end + kHeader) - at);  // a signature may begin at the very end
    in.seekg(static_cast<std::streamoff>(at));
    in.read(piece.data(), static_cast<std::streamsize>(piece.size()));
    const std::string_view text(piece.data(), piece.size());
    for (std::size_t found = text.find(kSignature); found != std::string_view::npos && at + found < end;
         found = text.find(kSignature, found + 1)) {
      std::uint64_t bytes = 0;
      in.seekg(static_cast<std::streamoff>(at + found + 8));
      in.read(reinterpret_cast<char*>(&bytes), sizeof(bytes));
      bool sound = bytes >= kHeader && bytes <= size - at - found && bytes <= limits::kMaxAttributeBytes;
      if (sound) {
        std::vector<std::byte> heap(bytes);
        in.seekg(static_cast<std::streamoff>(at + found));
        in.read(reinterpret_cast<char*>(heap.data()), static_cast<std::streamsize>(bytes));
        sound = in.good() && is_sound_heap(heap);
      }
      if (!sound) {
        throw StorageError(fmt::format("{}: the heap of texts at byte {} is damaged", where, at + found));
      }
    }
    at = end;
  }
  last_checked = number;
}

std::uint64_t file_bytes(hid_t object, const std::string& where) {
  const Handle file = handle(where + " has no file", [&] { return H5Iget_file_id(object); });
  hsize_t bytes = 0;
  checked(where + ": its file has no size", [&] { return H5Fget_filesize(file.get(), &bytes); });
  return bytes;
}

// A column is read whole: `n` values that take `each` bytes of memory must be in proportion to the file.
void refuse_large_column(std::uint64_t bytes, std::uint64_t n, std::uint64_t each, const std::string& where) {
  const std::uint64_t most = limits::kColumn.of(bytes);
  if (n > most / each) {
    throw StorageError(fmt::format("{} holds {} values of {} bytes; in a file of {} bytes at most {} bytes are allowed",
                                   where, n, each, bytes, most));
  }
}

// Where the library puts texts of variable length, any number of which may stand for the same bytes of the file.
class TextStore {
 public:
  explicit TextStore(std::uint64_t most) : left_(most) {}
  TextStore(const TextStore&) = delete;
  TextStore& operator=(const TextStore&) = delete;

  bool exhausted() const { return exhausted_; }

  // Settings for a read that takes its memory here.
  Handle transfer() {
    Handle settings = handle("cannot make transfer settings", [] { return H5Pcreate(H5P_DATASET_XFER); });
    checked("cannot set the memory of texts",
            [&] { return H5Pset_vlen_mem_manager(settings.get(), give, this, take_back, nullptr); });
    return settings;
  }

 private:
  static void* give(std::size_t bytes, void* self) noexcept {
    auto& store = *static_cast<TextStore*>(self);
    if (bytes > store.left_) {
      store.exhausted_ = true;
      return nullptr;
    }
    store.left_ -= bytes;
    try {
      store.texts_.push_back(std::make_unique<char[]>(bytes));
      return store.texts_.back().get();
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  static void take_back(void*, void*) noexcept {}  // all of it goes with the store

  std::uint64_t left_;
  bool exhausted_ = false;
  std::vector<std::unique_ptr<char[]>> texts_;
};

// `read(memory_type, buffer)` fills a buffer with n texts, with these transfer settings; here is what both attributes
// and datasets do around it.
template <typename Read>
std::vector<std::string> read_texts_with(hid_t object, hid_t file_type, std::uint64_t n, hid_t space, hid_t transfer,
                                         const std::string& where, Read&& read) {
  const std::uint64_t bytes = file_bytes(object, where);
  refuse_large_column(bytes, n, sizeof(std::string) + sizeof(char*), where);
  std::vector<std::string> texts(n);
  if (checked(where + ": cannot read the text type", [&] { return H5Tis_variable_str(file_type); }) > 0) {
    check_heaps(object, where);
    Handle memory = handle(where + ": cannot copy the text type", [&] { return H5Tcopy(H5T_C_S1); });
    checked(where + ": cannot set the text type", [&] { return H5Tset_size(memory.get(), H5T_VARIABLE); });
    checked(where + ": cannot set the text type", [&] { return H5Tset_cset(memory.get(), H5Tget_cset(file_type)); });
    std::vector<char*> raw(n, nullptr);
    // The library allocated the strings, also where the copy below fails.
    const auto reclaim = [&](void*) { H5Dvlen_reclaim(memory.get(), space, transfer, raw.data()); };
    const std::unique_ptr<void, decltype(reclaim)> guard(&raw, reclaim);
    read(memory.get(), static_cast<void*>(raw.data()));
    for (std::uint64_t i = 0; i < n; ++i) {
      texts[i] = raw[i] == nullptr ? "" : raw[i];
      refuse_large_column(bytes, n, texts[i].size() + 1, where);  // as it would be in the form that we write
    }
    return texts;
  }
  const std::size_t width = H5Tget_size(file_type);
  if (width == 0) {
    throw StorageError(where + " holds texts of no width");
  }
  refuse_large_column(bytes, n, width, where);
  std::vector<char> raw(n * width);
  read(file_type, static_cast<void*>(raw.data()));
  for (std::uint64_t i = 0; i < n; ++i) {
    texts[i] = trimmed(raw.data() + i * width, width);
  }
  return texts;
}

// The library clamps what does not fit a signed 64-bit integer; a value at that end is therefore
// refused.
void refuse_clamped(std::span<const std::int64_t> values, const std::string& where) {
  for (const std::int64_t value : values) {
    if (value == std::numeric_limits<std::int64_t>::max()) {
      throw StorageError(where + " holds an integer that does not fit 63 bits");
    }
  }
}

std::string quoted(const std::string& where, const std::string& name) { return where + "@" + name; }

struct OpenAttribute {
  Handle attribute, type, space;
  std::uint64_t n = 0;
  std::string where;
};

OpenAttribute open_attribute(hid_t object, const std::string& object_where, const std::string& name) {
  OpenAttribute a;
  a.where = quoted(object_where, name);
  silence();
  if (H5Aexists(object, name.c_str()) <= 0) {
    throw StorageError(object_where + " lacks the attribute '" + name + "'");
  }
  a.attribute = handle(a.where + " cannot be opened", [&] { return H5Aopen(object, name.c_str(), H5P_DEFAULT); });
  a.type = handle(a.where + " has no type", [&] { return H5Aget_type(a.attribute.get()); });
  a.space = handle(a.where + " has no dataspace", [&] { return H5Aget_space(a.attribute.get()); });
  const Shape shape = shape_of_space(a.space.get(), a.where);
  if (shape.size() > 1 || n_elements(shape) > limits::kMaxAttributeBytes / 8) {
    throw StorageError(a.where + " has shape " + to_string(shape) + ", but must be one value or a list");
  }
  a.n = n_elements(shape);
  const std::uint64_t bytes = file_bytes(object, a.where), element = H5Tget_size(a.type.get());
  if (element == 0 || a.n > bytes / element) {
    throw StorageError(
        fmt::format("{} claims {} values of {} bytes in a file of {} bytes", a.where, a.n, element, bytes));
  }
  return a;
}

template <typename T>
std::vector<T> read_numbers(const OpenAttribute& a, hid_t memory) {
  std::vector<T> values(a.n);
  if (a.n > 0) {
    checked(a.where + " cannot be read", [&] { return H5Aread(a.attribute.get(), memory, values.data()); });
  }
  return values;
}

void write_attribute(hid_t object, const std::string& where, const std::string& name, hid_t type, const Shape& shape,
                     const void* data) {
  const std::string context = quoted(where, name) + " cannot be written";
  if (checked(context, [&] { return H5Aexists(object, name.c_str()); }) > 0) {
    Handle old = handle(context, [&] { return H5Aopen(object, name.c_str(), H5P_DEFAULT); });
    Handle old_type = handle(context, [&] { return H5Aget_type(old.get()); });
    Handle old_space = handle(context, [&] { return H5Aget_space(old.get()); });
    if (H5Tequal(old_type.get(), type) > 0 && shape_of_space(old_space.get(), where) == shape) {
      checked(context, [&] { return H5Awrite(old.get(), type, data); });
      return;
    }
    old = Handle();
    checked(context, [&] { return H5Adelete(object, name.c_str()); });
  }
  const Handle space = make_space(shape);
  const Handle attribute =
      handle(context, [&] { return H5Acreate2(object, name.c_str(), type, space.get(), H5P_DEFAULT, H5P_DEFAULT); });
  if (n_elements(shape) > 0) {
    checked(context, [&] { return H5Awrite(attribute.get(), type, data); });
  }
}

// Settings for a new object. Objects carry no times: the same command must give the same bytes.
Handle untimed(hid_t kind) {
  Handle creation = handle("cannot make creation settings", [&] { return H5Pcreate(kind); });
  checked("cannot leave out times", [&] { return H5Pset_obj_track_times(creation.get(), false); });
  return creation;
}

std::string errno_text() { return std::generic_category().message(errno); }

// Files are kept to what every reader since HDF5 1.8 knows, in the form whose metadata carries
// checksums.
Handle file_access() {
  Handle access = handle("cannot make file access settings", [] { return H5Pcreate(H5P_FILE_ACCESS); });
  checked("cannot set the format bounds",
          [&] { return H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V110); });
  checked("cannot set the close degree", [&] { return H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG); });
  checked("cannot set file locking", [&] { return H5Pset_file_locking(access.get(), false, true); });
  // No sieve buffer: a write that does not fit the disk fails when it is made, not when nobody can be told.
  checked("cannot set the sieve buffer", [&] { return H5Pset_sieve_buf_size(access.get(), 0); });
  return access;
}

}  // namespace

std::size_t size_of(Type type) {
  switch (type) {
    case Type::i8:
    case Type::u8:
      return 1;
    case Type::f16:
    case Type::bf16:
    case Type::i16:
    case Type::u16:
      return 2;
    case Type::f32:
    case Type::i32:
    case Type::u32:
      return 4;
    case Type::f64:
    case Type::i64:
    case Type::u64:
      return 8;
    case Type::text:
    case Type::other:
      return 0;
  }
  return 0;
}

std::string_view name_of(Type type) {
  switch (type) {
    case Type::f16:
      return "float16";
    case Type::bf16:
      return "bfloat16";
    case Type::f32:
      return "float32";
    case Type::f64:
      return "float64";
    case Type::i8:
      return "int8";
    case Type::i16:
      return "int16";
    case Type::i32:
      return "int32";
    case Type::i64:
      return "int64";
    case Type::u8:
      return "uint8";
    case Type::u16:
      return "uint16";
    case Type::u32:
      return "uint32";
    case Type::u64:
      return "uint64";
    case Type::text:
      return "text";
    case Type::other:
      return "another type";
  }
  return "another type";
}

bool is_integer(Type type) {
  return type == Type::i8 || type == Type::i16 || type == Type::i32 || type == Type::i64 || type == Type::u8 ||
         type == Type::u16 || type == Type::u32 || type == Type::u64;
}

std::string to_string(const Shape& shape) { return fmt::format("({})", fmt::join(shape, ", ")); }

std::uint64_t n_elements(const Shape& shape) {
  std::uint64_t n = 1;
  for (const std::uint64_t dim : shape) {
    if (dim != 0 && n > std::numeric_limits<std::uint64_t>::max() / dim) {
      throw StorageError("the shape " + to_string(shape) + " has more elements than 64 bits can count");
    }
    n *= dim;
  }
  return n;
}

Handle::~Handle() {
  if (id_ >= 0) {
    H5Idec_ref(id_);
  }
}

std::vector<std::string> Object::attribute_names() const {
  // Looking for a name that nobody uses decodes every attribute and fails cleanly on a damaged one;
  // listing them would crash HDF5 1.10.
  has_attribute(" ");
  std::vector<std::string> names;
  const auto add = [](hid_t, const char* name, const H5A_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  checked(where_ + ": attributes cannot be listed",
          [&] { return H5Aiterate2(handle_.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &names); });
  std::sort(names.begin(), names.end());
  return names;
}

bool Object::has_attribute(const std::string& name) const {
  return checked(where_ + ": attributes cannot be read", [&] { return H5Aexists(handle_.get(), name.c_str()); }) > 0;
}

std::string Object::text(const std::string& name) const {
  const OpenAttribute a = open_attribute(handle_.get(), where_, name);
  if (classify(a.type.get()) != Type::text || a.n != 1) {
    throw StorageError(a.where + " must be one text");
  }
  return read_texts_with(handle_.get(), a.type.get(), 1, a.space.get(), H5P_DEFAULT, a.where,
                         [&](hid_t memory, void* out) {
                           checked(a.where + " cannot be read",
                                   [&] { return H5Aread(a.attribute.get(), memory, out); });
                         })
      .front();
}

std::int64_t Object::integer(const std::string& name) const {
  const std::vector<std::int64_t> values = integers(name);
  if (values.size() != 1) {
    throw StorageError(fmt::format("{} must be one integer, but holds {}", quoted(where_, name), values.size()));
  }
  return values.front();
}

double Object::real(const std::string& name) const {
  const std::vector<double> values = reals(name);
  if (values.size() != 1) {
    throw StorageError(fmt::format("{} must be one number, but holds {}", quoted(where_, name), values.size()));
  }
  return values.front();
}

std::vector<std::int64_t> Object::integers(const std::string& name) const {
  const OpenAttribute a = open_attribute(handle_.get(), where_, name);
  // numpy's bool is an HDF5 enumeration over int8.
  const bool is_bool = H5Tget_class(a.type.get()) == H5T_ENUM && H5Tget_size(a.type.get()) == 1;
  if (is_bool) {
    std::vector<std::int8_t> raw(a.n);
    if (a.n > 0) {
      checked(a.where + " cannot be read", [&] { return H5Aread(a.attribute.get(), a.type.get(), raw.data()); });
    }
    return {raw.begin(), raw.end()};
  }
  if (H5Tget_class(a.type.get()) != H5T_INTEGER || H5Tget_size(a.type.get()) > 8) {
    throw StorageError(a.where + " must be of an integer type");
  }
  std::vector<std::int64_t> values = read_numbers<std::int64_t>(a, H5T_NATIVE_INT64);
  refuse_clamped(values, a.where);
  return values;
}

std::vector<double> Object::reals(const std::string& name) const {
  const OpenAttribute a = open_attribute(handle_.get(), where_, name);
  const H5T_class_t kind = H5Tget_class(a.type.get());
  if (kind != H5T_FLOAT && kind != H5T_INTEGER) {
    throw StorageError(a.where + " must be of a number type");
  }
  return read_numbers<double>(a, H5T_NATIVE_DOUBLE);
}

void Object::reserve_text(const std::string& name, std::size_t bytes) const {
  const std::string padding(bytes, '\0');
  write_attribute(handle_.get(), where_, name, make_text_type(bytes).get(), {}, padding.data());
}

void Object::set(const std::string& name, std::string_view text) const {
  std::size_t width = std::max<std::size_t>(text.size(), 1);
  if (has_attribute(name)) {
    const OpenAttribute old = open_attribute(handle_.get(), where_, name);
    if (classify(old.type.get()) == Type::text && H5Tis_variable_str(old.type.get()) == 0) {
      width = std::max(width, H5Tget_size(old.type.get()));
    }
  }
  std::string padded(text);
  padded.resize(width, '\0');
  write_attribute(handle_.get(), where_, name, make_text_type(width).get(), {}, padded.data());
}

void Object::set(const std::string& name, std::int64_t value) const {
  write_attribute(handle_.get(), where_, name, H5T_STD_I64LE, {}, &value);
}

void Object::set(const std::string& name, double value) const {
  write_attribute(handle_.get(), where_, name, H5T_IEEE_F64LE, {}, &value);
}

void Object::set(const std::string& name, std::span<const std::int32_t> values) const {
  write_attribute(handle_.get(), where_, name, H5T_STD_I32LE, {values.size()}, values.data());
}

void Object::set(const std::string& name, std::span<const double> values) const {
  write_attribute(handle_.get(), where_, name, H5T_IEEE_F64LE, {values.size()}, values.data());
}

Type Dataset::type() const {
  return classify(handle(where_ + " has no type", [&] { return H5Dget_type(handle_.get()); }).get());
}

Shape Dataset::shape() const {
  const Handle space = handle(where_ + " has no dataspace", [&] { return H5Dget_space(handle_.get()); });
  return shape_of_space(space.get(), where_);
}

std::size_t Dataset::text_bytes() const {
  const Handle type = handle(where_ + " has no type", [&] { return H5Dget_type(handle_.get()); });
  if (classify(type.get()) != Type::text || H5Tis_variable_str(type.get()) > 0) {
    return 0;
  }
  return H5Tget_size(type.get());
}

Storage Dataset::storage() const {
  const hid_t id = handle_.get();
  const Handle creation = handle(where_ + " has no creation settings", [&] { return H5Dget_create_plist(id); });
  const Shape dims = shape();
  const std::uint64_t element = H5Tget_size(handle(where_ + " has no type", [&] { return H5Dget_type(id); }).get());
  Storage storage;
  if (H5Pget_external_count(creation.get()) != 0) {
    throw StorageError(where_ + " keeps its data in another file, which is not allowed");
  }
  const H5D_layout_t layout = H5Pget_layout(creation.get());
  if (layout == H5D_CONTIGUOUS) {
    const haddr_t offset = H5Dget_offset(id);
    const std::uint64_t n = n_elements(dims);
    if (element != 0 && n > std::numeric_limits<std::uint64_t>::max() / element) {
      throw StorageError(where_ + " has more bytes than 64 bits can count");
    }
    const std::uint64_t bytes = n * element;
    storage.extents.push_back(offset == HADDR_UNDEF ? Extent{} : Extent{offset, bytes});
    return storage;
  }
  if (layout != H5D_CHUNKED) {
    throw StorageError(where_ + " is neither contiguous nor chunked");
  }
  std::vector<hsize_t> chunk(dims.size());
  checked(where_ + ": its chunks cannot be read",
          [&] { return H5Pget_chunk(creation.get(), static_cast<int>(chunk.size()), chunk.data()); });
  storage.chunk.assign(chunk.begin(), chunk.end());

  const int n_filters =
      checked(where_ + ": its filters cannot be read", [&] { return H5Pget_nfilters(creation.get()); });
  for (int i = 0; i < n_filters; ++i) {
    unsigned flags = 0, config = 0;
    std::size_t n_values = 0;
    char name[64] = "";
    const H5Z_filter_t filter = H5Pget_filter2(creation.get(), static_cast<unsigned>(i), &flags, &n_values, nullptr,
                                               sizeof(name), name, &config);
    if (filter == H5Z_FILTER_SHUFFLE && !storage.shuffle && !storage.deflate) {
      storage.shuffle = true;
    } else if (filter == H5Z_FILTER_DEFLATE && !storage.deflate) {
      storage.deflate = true;
    } else {
      throw StorageError(fmt::format("{} uses filter {} ({}); only shuffle (2) and then deflate (1) are allowed",
                                     where_, filter, trimmed(name, sizeof(name))));
    }
  }

  Shape grid(dims.size());  // chunks along each dimension
  for (std::size_t d = 0; d < dims.size(); ++d) {
    if (chunk[d] == 0) {
      throw StorageError(where_ + " has chunks of zero size");
    }
    grid[d] = dims[d] / chunk[d] + (dims[d] % chunk[d] != 0 ? 1 : 0);
  }
  const std::uint64_t n_chunks = n_elements(grid);
  if (n_chunks > limits::kMaxChunks) {
    throw StorageError(fmt::format("{} has {} chunks; at most {} are allowed", where_, n_chunks, limits::kMaxChunks));
  }
  storage.extents.resize(n_chunks);
  std::vector<hsize_t> corner(dims.size());
  for (std::uint64_t i = 0; i < n_chunks; ++i) {
    std::uint64_t rest = i;
    for (std::size_t d = dims.size(); d-- > 0;) {
      corner[d] = (rest % grid[d]) * chunk[d];
      rest /= grid[d];
    }
    unsigned mask = 0;
    haddr_t offset = HADDR_UNDEF;
    hsize_t bytes = 0;
    checked(where_ + ": a chunk cannot be located",
            [&] { return H5Dget_chunk_info_by_coord(id, corner.data(), &mask, &offset, &bytes); });
    if (offset == HADDR_UNDEF) {
      continue;
    }
    if (mask != 0) {
      throw StorageError(where_ + " has a chunk for which a filter was left out, which is not allowed");
    }
    storage.extents[i] = {offset, bytes};
  }
  return storage;
}

namespace {

void check_bytes(std::uint64_t expected, std::size_t found, const std::string& where) {
  if (expected != found) {
    throw StorageError(fmt::format("{}: expected {} bytes, found {}", where, expected, found));
  }
}

// Selects [start, start + count) in the dataset's own space.
Handle select_block(hid_t dataset, const Shape& start, const Shape& count, const std::string& where) {
  Handle space = handle(where + " has no dataspace", [&] { return H5Dget_space(dataset); });
  const Shape dims = shape_of_space(space.get(), where);
  if (start.size() != dims.size() || count.size() != dims.size()) {
    throw StorageError(where + " has " + std::to_string(dims.size()) + " dimensions, which the block must match");
  }
  for (std::size_t d = 0; d < dims.size(); ++d) {
    if (start[d] > dims[d] || count[d] > dims[d] - start[d]) {
      throw StorageError(fmt::format("{}: the block at {} of {} lies outside {}", where, to_string(start),
                                     to_string(count), to_string(dims)));
    }
  }
  if (!dims.empty()) {
    const std::vector<hsize_t> from(start.begin(), start.end()), n(count.begin(), count.end());
    checked(where + ": cannot select a block",
            [&] { return H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, from.data(), nullptr, n.data(), nullptr); });
  }
  return space;
}

}  // namespace

void Dataset::write_block(const Shape& start, const Shape& count, std::span<const std::byte> data) const {
  const Handle type = handle(where_ + " has no type", [&] { return H5Dget_type(handle_.get()); });
  check_bytes(n_elements(count) * H5Tget_size(type.get()), data.size(), where_);
  const Handle file_space = select_block(handle_.get(), start, count, where_);
  const Handle memory_space = make_space(count);
  checked(where_ + " cannot be written", [&] {
    return H5Dwrite(handle_.get(), type.get(), memory_space.get(), file_space.get(), H5P_DEFAULT, data.data());
  });
}

void Dataset::read_block(const Shape& start, const Shape& count, std::span<std::byte> data) const {
  const Handle type = handle(where_ + " has no type", [&] { return H5Dget_type(handle_.get()); });
  check_bytes(n_elements(count) * H5Tget_size(type.get()), data.size(), where_);
  const Handle file_space = select_block(handle_.get(), start, count, where_);
  const Handle memory_space = make_space(count);
  checked(where_ + " cannot be read", [&] {
    return H5Dread(handle_.get(), type.get(), memory_space.get(), file_space.get(), H5P_DEFAULT, data.data());
  });
}

void Dataset::write(std::span<const std::byte> data) const {
  const Shape dims = shape();
  write_block(Shape(dims.size(), 0), dims, data);
}

void Dataset::read(std::span<std::byte> data) const {
  const Shape dims = shape();
  read_block(Shape(dims.size(), 0), dims, data);
}

// What the library is about to read whole must be in proportion to the file and lie in it, and its chunks must inflate
// to their size and no further: the library would follow a deflated stream to its end, however long it is.
std::uint64_t Dataset::column_length(std::uint64_t each) const {
  const hid_t id = handle_.get();
  const Shape dims = shape();
  if (dims.size() > 1) {
    throw StorageError(where_ + " has shape " + to_string(dims) + ", but must be one-dimensional");
  }
  const std::uint64_t n = n_elements(dims), stored = H5Dget_storage_size(id), size = file_bytes(id, where_);
  if (n > 0 && n / limits::kMaxInflation > stored) {
    throw StorageError(fmt::format("{} claims {} elements but stores {} bytes", where_, n, stored));
  }
  refuse_large_column(size, n, each, where_);
  const Handle creation = handle(where_ + " has no creation settings", [&] { return H5Dget_create_plist(id); });
  if (H5Pget_layout(creation.get()) == H5D_COMPACT) {
    return n;
  }
  const Storage stored_as = storage();
  for (const Extent& extent : stored_as.extents) {
    if (extent.offset > size || extent.bytes > size - extent.offset) {
      throw StorageError(fmt::format("{} lies at bytes {} to {} of a file of {} bytes", where_, extent.offset,
                                     extent.offset + extent.bytes, size));
    }
  }
  if (stored_as.chunk.empty()) {
    return n;
  }
  const Handle type = handle(where_ + " has no type", [&] { return H5Dget_type(id); });
  const std::size_t element = H5Tget_size(type.get());
  refuse_large_column(size, n_elements(stored_as.chunk), element, where_ + " has a chunk that");
  const std::size_t chunk_bytes = n_elements(stored_as.chunk) * element;
  std::vector<std::byte> deflated, inflated;
  for (std::size_t i = 0; stored_as.deflate && i < stored_as.extents.size(); ++i) {
    if (stored_as.extents[i].bytes == 0) {
      continue;
    }
    deflated.resize(stored_as.extents[i].bytes);
    inflated.resize(chunk_bytes);
    const hsize_t corner = i * stored_as.chunk[0];
    std::uint32_t filters = 0;
    checked(where_ + " cannot be read",
            [&] { return H5Dread_chunk(id, H5P_DEFAULT, &corner, &filters, deflated.data()); });
    if (!inflate_exactly(deflated, inflated, Deflated::zlib)) {
      throw StorageError(fmt::format("{}: a chunk does not inflate to its {} bytes", where_, chunk_bytes));
    }
  }
  return n;
}

namespace {

template <typename T>
std::vector<T> read_column_as(hid_t dataset, std::uint64_t n, hid_t memory, const std::string& where) {
  std::vector<T> values(n);
  if (n > 0) {
    checked(where + " cannot be read",
            [&] { return H5Dread(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()); });
  }
  return values;
}

}  // namespace

std::vector<std::int64_t> Dataset::read_integers() const {
  const Type kind = type();
  if (!is_integer(kind)) {
    throw StorageError(fmt::format("{} must hold integers, but holds {}", where_, name_of(kind)));
  }
  const std::uint64_t n = column_length(sizeof(std::int64_t));
  auto values = read_column_as<std::int64_t>(handle_.get(), n, H5T_NATIVE_INT64, where_);
  refuse_clamped(values, where_);
  return values;
}

std::vector<double> Dataset::read_reals() const {
  const Type kind = type();
  if (!is_integer(kind) && (kind == Type::text || kind == Type::other)) {
    throw StorageError(fmt::format("{} must hold numbers, but holds {}", where_, name_of(kind)));
  }
  const std::uint64_t n = column_length(sizeof(double));
  return read_column_as<double>(handle_.get(), n, H5T_NATIVE_DOUBLE, where_);
}

std::vector<std::string> Dataset::read_texts() const {
  const Handle type = handle(where_ + " has no type", [&] { return H5Dget_type(handle_.get()); });
  if (classify(type.get()) != Type::text) {
    throw StorageError(where_ + " must hold texts");
  }
  const Handle space = handle(where_ + " has no dataspace", [&] { return H5Dget_space(handle_.get()); });
  const std::uint64_t n = column_length(std::max(sizeof(std::string), H5Tget_size(type.get())));
  if (n == 0) {
    return {};
  }
  const std::uint64_t most = limits::kColumn.of(file_bytes(handle_.get(), where_));
  TextStore store(most);
  const Handle transfer = store.transfer();
  return read_texts_with(
      handle_.get(), type.get(), n, space.get(), transfer.get(), where_, [&](hid_t memory, void* out) {
        silence();
        const herr_t status = H5Dread(handle_.get(), memory, H5S_ALL, H5S_ALL, transfer.get(), out);
        if (status < 0 && store.exhausted()) {
          H5Eclear2(H5E_DEFAULT);
          throw StorageError(fmt::format("{} holds texts of more than {} bytes, which its file may not", where_, most));
        }
        checked(where_ + " cannot be read", [&] { return status; });
      });
}

std::vector<std::string> Group::children() const {
  std::vector<std::string> names;
  const auto add = [](hid_t, const char* name, const H5L_info_t* info, void* out) -> herr_t {
    auto& list = *static_cast<std::vector<std::string>*>(out);
    list.emplace_back(info->type == H5L_TYPE_HARD ? name : "");
    return info->type == H5L_TYPE_HARD ? 0 : 1;
  };
  const int stopped = checked(where_ + ": its members cannot be listed", [&] {
    return H5Literate(handle_.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &names);
  });
  if (stopped > 0) {
    throw StorageError(where_ + " holds a soft or external link, which is not allowed");
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool Group::has(const std::string& name) const {
  return checked(where_ + ": its members cannot be read",
                 [&] { return H5Lexists(handle_.get(), name.c_str(), H5P_DEFAULT); }) > 0;
}

namespace {

std::string below(const std::string& where, const std::string& name) {
  return where.ends_with('/') ? where + name : where + "/" + name;
}

// Opens a member that must exist, be a hard link and be of the asked kind.
Handle open_member(hid_t group, const std::string& where, const std::string& name, H5I_type_t kind) {
  const std::string full = below(where, name);
  const char* noun = kind == H5I_GROUP ? "group" : "dataset";
  silence();
  H5L_info_t info{};
  if (H5Lexists(group, name.c_str(), H5P_DEFAULT) <= 0 || H5Lget_info(group, name.c_str(), &info, H5P_DEFAULT) < 0) {
    H5Eclear2(H5E_DEFAULT);
    throw StorageError(full + " is missing (a " + noun + " is expected)");
  }
  if (info.type != H5L_TYPE_HARD) {
    throw StorageError(full + " is a soft or external link, which is not allowed");
  }
  Handle member = handle(full + " cannot be opened", [&] { return H5Oopen(group, name.c_str(), H5P_DEFAULT); });
  if (H5Iget_type(member.get()) != kind) {
    throw StorageError(full + " must be a " + noun);
  }
  return member;
}

}  // namespace

Group Group::create_group(const std::string& name) const {
  const std::string full = below(where_, name);
  const std::string context = full + " cannot be created";
  const Handle creation = untimed(H5P_GROUP_CREATE);
  return Group(
      handle(context,
             [&] { return H5Gcreate2(handle_.get(), name.c_str(), H5P_DEFAULT, creation.get(), H5P_DEFAULT); }),
      full);
}

Group Group::group(const std::string& name) const {
  return Group(open_member(handle_.get(), where_, name, H5I_GROUP), below(where_, name));
}

namespace {

Handle create_dataset(hid_t group, const std::string& full, const std::string& name, hid_t type, const Shape& shape,
                      const Layout& layout) {
  const std::string context = full + " cannot be created";
  const Handle creation = untimed(H5P_DATASET_CREATE);
  if (!layout.chunk.empty()) {
    const std::vector<hsize_t> chunk(layout.chunk.begin(), layout.chunk.end());
    checked(context, [&] { return H5Pset_chunk(creation.get(), static_cast<int>(chunk.size()), chunk.data()); });
    if (layout.deflate > 0) {
      checked(context, [&] { return H5Pset_shuffle(creation.get()); });
      checked(context, [&] { return H5Pset_deflate(creation.get(), static_cast<unsigned>(layout.deflate)); });
    }
  } else if (layout.reserved) {
    checked(context, [&] { return H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY); });
    checked(context, [&] { return H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER); });
  }
  const Handle space = make_space(shape);
  return handle(context, [&] {
    return H5Dcreate2(group, name.c_str(), type, space.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT);
  });
}

}  // namespace

Dataset Group::create(const std::string& name, Type type, const Shape& shape, const Layout& layout) const {
  const std::string full = below(where_, name);
  return Dataset(create_dataset(handle_.get(), full, name, make_type(type).get(), shape, layout), full);
}

Dataset Group::dataset(const std::string& name) const {
  return Dataset(open_member(handle_.get(), where_, name, H5I_DATASET), below(where_, name));
}

void Group::commit_type(const std::string& name, Type type) const {
  const Handle made = make_type(type);
  const Handle creation = untimed(H5P_DATATYPE_CREATE);
  checked(below(where_, name) + " cannot be committed", [&] {
    return H5Tcommit2(handle_.get(), name.c_str(), made.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT);
  });
}

Dataset Group::create_texts(const std::string& name, std::size_t width, std::uint64_t n, const Layout& layout) const {
  const std::string full = below(where_, name);
  return Dataset(create_dataset(handle_.get(), full, name, make_text_type(width).get(), {n}, layout), full);
}

Dataset Group::write_column(const std::string& name, std::span<const std::string> values) const {
  std::size_t width = 1;
  for (const std::string& value : values) {
    width = std::max(width, value.size());
  }
  std::vector<char> raw(values.size() * width, '\0');
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::copy(values[i].begin(), values[i].end(), raw.begin() + static_cast<std::ptrdiff_t>(i * width));
  }
  Dataset dataset = create_texts(name, width, values.size());
  if (!values.empty()) {
    dataset.write(bytes_of(raw));
  }
  return dataset;
}

namespace {

template <typename T>
Dataset write_numbers(const Group& group, const std::string& name, Type type, std::span<const T> values) {
  Dataset dataset = group.create(name, type, {values.size()});
  if (!values.empty()) {
    dataset.write(std::as_bytes(values));
  }
  return dataset;
}

}  // namespace

Dataset Group::write_column(const std::string& name, std::span<const std::int32_t> values) const {
  return write_numbers(*this, name, Type::i32, values);
}
Dataset Group::write_column(const std::string& name, std::span<const std::int64_t> values) const {
  return write_numbers(*this, name, Type::i64, values);
}
Dataset Group::write_column(const std::string& name, std::span<const double> values) const {
  return write_numbers(*this, name, Type::f64, values);
}
Dataset Group::write_column(const std::string& name, std::span<const float> values) const {
  return write_numbers(*this, name, Type::f32, values);
}
Dataset Group::write_column(const std::string& name, std::span<const std::uint8_t> values) const {
  return write_numbers(*this, name, Type::u8, values);
}

std::filesystem::path File::part_of(const std::filesystem::path& path) {
  return std::filesystem::path(path.string() + ".part");
}

File File::create(const std::filesystem::path& path) { return create(path, part_of(path)); }

File File::create(const std::filesystem::path& path, const std::filesystem::path& part) {
  const Handle access = file_access();
  const Handle creation = untimed(H5P_FILE_CREATE);
  Handle file;
  std::error_code ignored;
  const auto size = [&] {
    return std::filesystem::exists(part, ignored) ? std::filesystem::file_size(part, ignored) : 0;
  };
  const std::uintmax_t before = size();
  try {
    file = handle(part.string() + " cannot be created",
                  [&] { return H5Fcreate(part.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()); });
  } catch (const StorageError&) {
    if (before == 0 || size() != before) {  // not somebody else's file that may not be replaced
      std::filesystem::remove(part, ignored);
    }
    throw;
  }
  Handle root = handle(part.string() + " has no root group", [&] { return H5Gopen2(file.get(), "/", H5P_DEFAULT); });
  return File(std::move(file), Group(std::move(root), path.filename().string() + ": /"), path, part);
}

namespace {

Handle open_file(const std::filesystem::path& path, unsigned flags) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    throw StorageError(path.string() + " does not exist");
  }
  if (!std::filesystem::is_regular_file(path, error)) {
    throw StorageError(path.string() + " is a folder or a device, but a file is expected");
  }
  const Handle access = file_access();
  Handle file =
      handle(path.string() + " cannot be opened as HDF5", [&] { return H5Fopen(path.c_str(), flags, access.get()); });
  // Offsets inside the file are taken as they are, which a user block would shift.
  const Handle creation =
      handle(path.string() + " has no creation settings", [&] { return H5Fget_create_plist(file.get()); });
  hsize_t user_block = 0;
  checked(path.string() + " has no superblock", [&] { return H5Pget_userblock(creation.get(), &user_block); });
  if (user_block != 0) {
    throw StorageError(path.string() + " has a user block, which is not allowed");
  }
  return file;
}

}  // namespace

File File::open(const std::filesystem::path& path) {
  Handle file = open_file(path, H5F_ACC_RDONLY);
  Handle root = handle(path.string() + " has no root group", [&] { return H5Gopen2(file.get(), "/", H5P_DEFAULT); });
  return File(std::move(file), Group(std::move(root), path.filename().string() + ": /"), path, {});
}

File File::open_write(const std::filesystem::path& path) {
  Handle file = open_file(path, H5F_ACC_RDWR);
  Handle root = handle(path.string() + " has no root group", [&] { return H5Gopen2(file.get(), "/", H5P_DEFAULT); });
  return File(std::move(file), Group(std::move(root), path.filename().string() + ": /"), path, {});
}

void File::close() {
  if (handle_.get() < 0) {
    return;
  }
  checked(path_.string() + " cannot be flushed", [&] { return H5Fflush(handle_.get(), H5F_SCOPE_LOCAL); });
  { const Handle root_handle = std::move(root_.handle_); }
  // The library writes once more here, and what fails now would be a damaged file.
  checked(path_.string() + " cannot be written", [last = handle_.release()] { return H5Fclose(last); });
}

void File::publish() {
  close();
  publish_file(part_, path_);
  part_.clear();
}

void File::discard() {
  { const Handle root_handle = std::move(root_.handle_); }
  { const Handle last = std::move(handle_); }
  if (!part_.empty()) {
    std::error_code ignored;
    std::filesystem::remove(part_, ignored);
    part_.clear();
  }
}

void sync(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    throw StorageError(path.string() + ": cannot be opened to flush it (" + errno_text() + ")");
  }
  const bool ok = ::fsync(fd) == 0 || errno == EINVAL;  // some file systems cannot sync a folder
  const std::string reason = ok ? "" : errno_text();
  ::close(fd);
  if (!ok) {
    throw StorageError(path.string() + ": cannot be flushed to disk (" + reason + ")");
  }
}

void publish_file(const std::filesystem::path& part, const std::filesystem::path& path) {
  sync(part);
  std::error_code error;
  std::filesystem::rename(part, path, error);
  if (error) {
    throw StorageError(part.string() + " cannot be renamed to " + path.string() + " (" + error.message() + ")");
  }
  const std::filesystem::path folder = path.parent_path();
  sync(folder.empty() ? "." : folder);
}

}  // namespace kvreplay::hdf5
