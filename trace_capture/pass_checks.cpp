#include "trace_capture/pass_checks.hpp"

#include <fmt/format.h>

#include <stdexcept>

namespace kvreplay {

void check_vocabulary(std::span<const std::int32_t> ids, int vocab) {
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab) {
      throw std::invalid_argument(fmt::format("token id {} is outside the vocabulary [0, {})", id, vocab));
    }
  }
}

void check_pass(std::span<const std::int32_t> ids, Pos n_past, Pos max_pass, Pos capacity, int vocab) {
  if (ids.empty() || ids.size() > static_cast<std::size_t>(max_pass)) {
    throw std::invalid_argument(fmt::format("a pass of {} tokens; it takes 1 to {}", ids.size(), max_pass));
  }
  if (ids.size() > static_cast<std::size_t>(capacity - n_past)) {
    throw std::invalid_argument(fmt::format("{} tokens after the first {} are more than the cache's capacity of {}",
                                            ids.size(), n_past, capacity));
  }
  check_vocabulary(ids, vocab);
}

void check_logits_of(Pos row, std::size_t n_out, Pos n_last, int vocab) {
  if (row < 0 || row >= n_last || n_out != static_cast<std::size_t>(vocab)) {
    throw std::invalid_argument(
        fmt::format("logits of row {} into {} values: the last pass has {} rows of {}", row, n_out, n_last, vocab));
  }
}

void check_scored(std::span<const std::int32_t> next, std::size_t n_out, Pos n_last, int vocab) {
  if (next.size() != n_out || next.size() > static_cast<std::size_t>(n_last)) {
    throw std::invalid_argument(fmt::format("log-probabilities of {} tokens into {} values: the last pass has {} rows",
                                            next.size(), n_out, n_last));
  }
  check_vocabulary(next, vocab);
}

}  // namespace kvreplay
