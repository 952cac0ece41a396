#include "trace_capture/cli/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace kvreplay {

std::string rates_text(double n_tokens, double seconds, const Recorder::Rates& rates) {
  const double time = std::max(seconds, 1e-9);
  return fmt::format("{:.0f} tokens/s, {:.1f} MB/s, stalled {:.0f} %", n_tokens / time,
                     static_cast<double>(rates.bytes) / 1e6 / time, 100 * rates.stall_seconds / time);
}

void say(const std::string& text) { std::fputs(text.c_str(), stderr); }

CaptureLine::CaptureLine() : terminal_(::isatty(STDERR_FILENO) == 1), last_(Clock::now()) {}

CaptureLine::~CaptureLine() {
  if (drawn_ && terminal_) {
    say("\r\033[K");
  }
}

void CaptureLine::at(const std::string& name, const CaptureProgress& progress) {
  const auto now = Clock::now();
  if (std::chrono::duration<double>(now - last_).count() < (terminal_ ? 0.2 : 30)) {
    return;
  }
  last_ = now;
  drawn_ = true;
  say(fmt::format("{}{}: {} {} of {} tokens, {}{}", terminal_ ? "\r\033[K" : "", name,
                  progress.done < progress.prompt_len ? "prefill," : "decode,", progress.done, progress.total,
                  rates_text(progress.done, progress.seconds, progress.rates), terminal_ ? "" : "\n"));
}

}  // namespace kvreplay
