// Progress of a long run on stderr: rate and time left on a terminal, one line every 30 s elsewhere.
#pragma once
#include <chrono>
#include <string>

namespace kvreplay {

class Progress {
 public:
  explicit Progress(double total);  // units of work
  ~Progress();
  void at(double done, const std::string& what);

 private:
  using Clock = std::chrono::steady_clock;
  double total_;
  bool terminal_, drawn_ = false;
  Clock::time_point start_, last_;
};

}  // namespace kvreplay
