// Progress of a long run on stderr: rate and time left on a terminal, one line every 30 s elsewhere.
#pragma once
#include <chrono>
#include <string>

namespace kvreplay {

class Progress {
 public:
  Progress();
  ~Progress();
  void at(double done, double total, const std::string& what);  // in decode steps of one method

 private:
  using Clock = std::chrono::steady_clock;
  bool terminal_, drawn_ = false;
  Clock::time_point start_, last_;
};

}  // namespace kvreplay
