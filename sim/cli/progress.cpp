#include "sim/cli/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace kvreplay {

Progress::Progress() : terminal_(::isatty(STDERR_FILENO) == 1), start_(Clock::now()), last_(start_) {}

Progress::~Progress() {
  if (drawn_ && terminal_) {
    std::fputs("\n", stderr);
  }
}

void Progress::at(double done, double total, const std::string& what) {
  const auto now = Clock::now();
  const double since_last = std::chrono::duration<double>(now - last_).count();
  if (since_last < (terminal_ ? 0.2 : 30)) {
    return;
  }
  last_ = now;
  drawn_ = true;
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const double share = total > 0 ? done / total : 1;
  const double left = share > 0 ? elapsed * (1 - share) / share : 0;
  const std::string line =
      fmt::format("{}{}: {:.0f} % done, {:.0f} steps/s, {:.0f} s left{}", terminal_ ? "\r\033[K" : "", what,
                  100 * share, done / elapsed, left, terminal_ ? "" : "\n");
  std::fputs(line.c_str(), stderr);  // fmt::print would throw where stderr cannot be written, and end the run
}

}  // namespace kvreplay
