// What the targets share: numbers and texts taken from the input, a file that holds it, and the one kind of failure
// that is no finding.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace kvreplay::fuzz {

// A property that does not hold: libFuzzer and the replay both report the input.
[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "property broken: %s\n", what.c_str());
  std::abort();
}
inline void require(bool holds, const std::string& what) {
  if (!holds) {
    fail(what);
  }
}

// The input, eaten from the front; what is asked for beyond its end is 0.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

  bool empty() const { return rest_.empty(); }
  std::uint8_t byte() {
    if (rest_.empty()) {
      return 0;
    }
    const std::uint8_t value = rest_.front();
    rest_ = rest_.subspan(1);
    return value;
  }
  bool flag() { return (byte() & 1U) != 0; }
  std::uint64_t number(int bytes) {
    std::uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      value |= std::uint64_t{byte()} << (8 * i);
    }
    return value;
  }
  std::size_t below(std::size_t n) { return byte() % n; }
  template <typename T, std::size_t n>
  const T& pick(const T (&choices)[n]) {
    return choices[below(n)];
  }
  std::vector<std::byte> bytes(std::size_t at_most) {
    const std::size_t n = std::min(at_most, rest_.size());
    const auto begin = reinterpret_cast<const std::byte*>(rest_.data());
    std::vector<std::byte> out(begin, begin + n);
    rest_ = rest_.subspan(n);
    return out;
  }
  std::string text(std::size_t at_most) {
    const std::vector<std::byte> raw = bytes(at_most);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }
  std::string all_text() { return text(rest_.size()); }

 private:
  std::span<const std::uint8_t> rest_;
};

// One folder per process, in memory where there is such a file system.
inline const std::filesystem::path& scratch() {
  struct Folder {
    std::filesystem::path path;
    Folder() {
      std::error_code error;
      const std::filesystem::path memory = "/dev/shm";
      path = (::access(memory.c_str(), W_OK) == 0 ? memory : std::filesystem::temp_directory_path(error)) /
             ("kvreplay_fuzz_" + std::to_string(::getpid()));
      std::filesystem::create_directories(path);
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static const Folder folder;
  return folder.path;
}

inline void write_file(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(text.data(), static_cast<std::streamsize>(text.size()));
}

// Does `work`. An Allowed error is an answer, which must say something; any other exception ends the program.
template <typename... Allowed, typename Work>
bool answered(Work&& work) {
  bool done = false;
  std::string message = "?";
  const auto attempt = [&]<typename First, typename... Rest>(auto&& self, std::type_identity<First>,
                                                             std::type_identity<Rest>... rest) -> void {
    try {
      if constexpr (sizeof...(Rest) == 0) {
        work();
        done = true;
      } else {
        self(self, rest...);
      }
    } catch (const First& error) {
      message = error.what();
    }
  };
  attempt(attempt, std::type_identity<Allowed>{}...);
  require(!message.empty(), "an error without a sentence");
  return done;
}

}  // namespace kvreplay::fuzz
