// The two families of error. ConfigError: the user asked for something that cannot be. KVREPLAY_CHECK: we are wrong.
#pragma once
#include <stdexcept>
#include <string>

namespace kvreplay {

// A method, parameter or option that cannot be used as given; the message is one sentence a stranger can act on.
class ConfigError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void check_failed(const char* condition, const char* file, int line) {
  throw std::logic_error(std::string("internal error: ") + condition + " does not hold at " + file + ":" +
                         std::to_string(line) + "; please report it");
}

}  // namespace kvreplay

#define KVREPLAY_CHECK(condition) ((condition) ? void() : ::kvreplay::check_failed(#condition, __FILE__, __LINE__))
