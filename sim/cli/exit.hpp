// Exit codes, as the README documents them.
#pragma once
#include <string>
#include <vector>

namespace kvreplay {

enum ExitCode { kDone = 0, kOther = 1, kUsage = 2, kTrace = 3, kDevice = 4, kInterrupted = 130 };

// Thrown where everything has been said already.
struct Exit {
  ExitCode code;
};

// What is thrown as the user is told of it.
struct Refusal {
  ExitCode code;
  std::string sentence;
};
Refusal current_refusal();  // in a catch block

// argv of this process.
const std::vector<std::string>& command_line();

}  // namespace kvreplay
