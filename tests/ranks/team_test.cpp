// What a sweep asks of its team, by processes that mpirun started; each prints what it saw and test_ranks.py compares.
//   team_test UNITS [FAILING-UNIT [CODE]]
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "policies/errors.hpp"
#include "sim/sweep/ranks.hpp"

using namespace kvreplay;

namespace {

void work(Team& team, std::size_t n, std::size_t failing) {
  for (const int round : {1, 2}) {
    const std::string plan = team.agree(team.leads() ? fmt::format("{} units in round {}", n, round) : "not this");
    fmt::print("agreed on {}\n", plan);
    team.begin(n);
    while (const auto unit = team.next()) {
      ::usleep(2000);
      team.attend();
      if (*unit == failing) {
        throw ConfigError("this unit fails");
      }
      fmt::print("round {} unit {}\n", round, *unit);
    }
    fmt::print("any {} {}\n", team.any(team.leads()), team.any(false));
  }
  const std::string long_text(3000000, 'x');
  fmt::print("long {}\n", team.agree(team.leads() ? long_text : "") == long_text);
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t n = std::strtoul(argv[1], nullptr, 10);
  const std::size_t failing = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : n;
  const int code = argc > 3 ? std::atoi(argv[3]) : 2;
  try {
    const std::unique_ptr<Team> team = team_of_environment();
    try {
      fmt::print("leads {} of {} here\n", team->leads(), team->n_here());
      work(*team, n, failing);
      return 0;
    } catch (const TeamFailed& failed) {
      fmt::print("failed {}\n", failed.code);
      return failed.code;
    } catch (const ConfigError& error) {
      fmt::print("first {}\n", team->fail(code));
      return code;
    }
  } catch (const ConfigError& error) {
    fmt::print("{}\n", error.what());
    return 2;
  }
}
