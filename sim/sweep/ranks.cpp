#include "sim/sweep/ranks.hpp"

#include <fmt/format.h>
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "policies/errors.hpp"
#include "sim/sweep/launched.hpp"

namespace kvreplay {
namespace {

// MPI's own handler ends the job when one of its calls fails, so their results need no look.
class Ranks final : public Team {
 public:
  Ranks() {
    int threads = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &threads);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    int size = 1;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size == 1) {
      MPI_Finalize();
      throw ConfigError(
          fmt::format("{} processes were started together, but MPI does not connect them; with srun add --mpi=pmix, or "
                      "give each its part with --shard",
                      n_launched()));
    }
    MPI_Comm here = MPI_COMM_NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &n_here_);
    MPI_Comm_free(&here);
    const MPI_Aint bytes = rank_ == 0 ? 2 * sizeof(std::int64_t) : 0;
    MPI_Win_allocate(bytes, sizeof(std::int64_t), MPI_INFO_NULL, MPI_COMM_WORLD, &shared_, &window_);
    MPI_Win_lock_all(0, window_);
    swap(kNext, 0);
    swap(kFailed, 0);
    MPI_Barrier(MPI_COMM_WORLD);
  }

  ~Ranks() override {
    MPI_Win_unlock_all(window_);
    MPI_Win_free(&window_);
    MPI_Finalize();
  }

  bool leads() const override { return rank_ == 0; }

  int n_here() const override { return n_here_; }

  std::string agree(const std::string& text) override {
    meet();
    std::uint64_t size = text.size();
    MPI_Bcast(&size, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    std::string all = text;
    all.resize(size);
    constexpr std::size_t kMost = std::size_t{1} << 30;  // MPI counts in int
    for (std::size_t at = 0; at < all.size(); at += kMost) {
      MPI_Bcast(all.data() + at, static_cast<int>(std::min(kMost, all.size() - at)), MPI_CHAR, 0, MPI_COMM_WORLD);
    }
    return all;
  }

  void begin(std::size_t n) override {
    meet();  // nobody still asks for units of before
    n_ = static_cast<std::int64_t>(n);
    if (leads()) {
      swap(kNext, 0);
    }
    meet();
  }

  std::optional<std::size_t> next() override {
    const std::int64_t one = 1;
    std::int64_t mine = 0;
    MPI_Fetch_and_op(&one, &mine, MPI_INT64_T, 0, kNext, MPI_SUM, window_);
    MPI_Win_flush(0, window_);
    return mine < n_ ? std::optional(static_cast<std::size_t>(mine)) : std::nullopt;
  }

  void wait() override { meet(); }

  bool any(bool mine) override {
    meet();
    return greatest(mine ? 1 : 0) != 0;
  }

  // Where no hardware serves the counter of the first rank, that rank has to, between two blocks of its own work.
  void attend() override {
    int arrived = 0;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &arrived, MPI_STATUS_IGNORE);
  }

  bool fail(int code) override {
    const bool first = swap(kFailed, code) == 0;
    swap(kNext, std::numeric_limits<std::int64_t>::max() / 2);  // the others finish their units and take no more
    greatest(code);
    return first;
  }

 private:
  enum Place : MPI_Aint { kNext, kFailed };

  // Every common step begins so, and a member that failed takes part in the next one, whichever it is.
  void meet() const {
    if (const int code = greatest(0); code != 0) {
      throw TeamFailed{code};
    }
  }

  static int greatest(int mine) {
    int all = 0;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    return all;
  }

  std::int64_t swap(Place place, std::int64_t value) {
    std::int64_t before = 0;
    MPI_Fetch_and_op(&value, &before, MPI_INT64_T, 0, place, MPI_REPLACE, window_);
    MPI_Win_flush(0, window_);
    return before;
  }

  int rank_ = 0, n_here_ = 1;
  std::int64_t* shared_ = nullptr;  // of the first rank: the next unit, and the code of a failure
  MPI_Win window_ = MPI_WIN_NULL;
  std::int64_t n_ = 0;
};

}  // namespace

std::unique_ptr<Team> team_of_environment() {
  return n_launched() > 1 ? std::make_unique<Ranks>() : std::make_unique<Team>();
}

}  // namespace kvreplay
