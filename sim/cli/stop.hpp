// How the programs end when they are asked to: at the next orderly place, and at once when they are asked again.
#pragma once
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <ctime>

#include "sim/cli/exit.hpp"

namespace kvreplay {

inline std::atomic<bool> stop_requested = false;

// The first signal asks for an orderly end; one that follows later (not in the same burst) ends the process at once.
inline void request_stop(int) {
  static double first = 0;
  timespec t{};  // of a clock that a signal handler may read
  clock_gettime(CLOCK_MONOTONIC, &t);
  const double now = static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  if (stop_requested && now - first > 0.1) {
    _exit(kInterrupted);
  }
  if (!stop_requested) {
    first = now;
  }
  stop_requested = true;
}

inline void stop_on_signals() {
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
}

}  // namespace kvreplay
