// Progress of a capture on stderr: rates and stall share on a terminal, one line every 30 s elsewhere.
#pragma once
#include <chrono>
#include <string>

#include "trace_capture/capture.hpp"

namespace kvreplay {

// "340 tokens/s, 12 MB/s, stalled 0 %"
std::string rates_text(double n_tokens, double seconds, const Recorder::Rates& rates);

// To stderr. Where that cannot be written, nothing happens: a capture goes on without its reader.
void say(const std::string& text);

class CaptureLine {
 public:
  CaptureLine();
  ~CaptureLine();
  void at(const std::string& name, const CaptureProgress& progress);

 private:
  using Clock = std::chrono::steady_clock;
  bool terminal_, drawn_ = false;
  Clock::time_point last_;
};

}  // namespace kvreplay
