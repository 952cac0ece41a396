// What is wrong with a trace, in one sentence that names file, dataset, what was expected and what was found.
#pragma once
#include <stdexcept>

namespace kvreplay {

class TraceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace kvreplay
