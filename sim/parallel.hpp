// One level of threads: tasks that share nothing.
#pragma once
#include <exception>

namespace kvreplay {

// Runs task(0) ... task(n - 1) on a team of threads. No exception may leave a parallel region: the first one is thrown
// after it.
template <class Task>
void parallel(int n, int threads, Task task) {
  std::exception_ptr first;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int i = 0; i < n; ++i) {
    try {
      task(i);
    } catch (...) {
#pragma omp critical(kvreplay_first_exception)
      if (!first) {
        first = std::current_exception();
      }
    }
  }
  if (first) {
    std::rethrow_exception(first);
  }
}

}  // namespace kvreplay
