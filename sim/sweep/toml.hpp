// toml++, held to its own preconditions.
#pragma once
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvreplay {

// Text that breaks a precondition of the parser. Thrown inside of it and refused by parse_toml.
struct BrokenToml : std::runtime_error {
  BrokenToml() : std::runtime_error("it is no TOML") {}
};
[[noreturn]] void throw_broken_toml();

}  // namespace kvreplay

// toml++ 3.3 takes its assertions for true where NDEBUG is defined, and text can make them false ("{a = 5to = 1}").
#pragma push_macro("NDEBUG")
#undef NDEBUG
#define TOML_HEADER_ONLY 1  // what the library itself holds was compiled without assertions
#define TOML_ASSERT(condition) ((condition) ? void() : kvreplay::throw_broken_toml())
#include <toml++/toml.h>
#pragma pop_macro("NDEBUG")

namespace kvreplay {

// ConfigError names the file, the line and what is wrong there.
toml::table parse_toml(std::string_view text, const std::string& name);

}  // namespace kvreplay
