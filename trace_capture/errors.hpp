// Errors of capturing that are neither a wrong option or model folder (ConfigError, policies/errors.hpp) nor a wrong
// trace (TraceError, traces/errors.hpp).
#pragma once
#include <stdexcept>

namespace kvreplay {

// No usable GPU, too little memory on it, or a CUDA call that failed. One sentence; exit code 4.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace kvreplay
