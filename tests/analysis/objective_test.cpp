#include "analysis/objective.hpp"

#include <catch2/catch.hpp>
#include <cmath>

#include "policies/errors.hpp"

using namespace kvreplay;

namespace {

void refuses(const std::string& text, const std::vector<std::string>& words) {
  INFO("objective " << text);
  try {
    Objective::parse(text);
    FAIL("was accepted");
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    INFO(what);
    CHECK(what.find('\n') == std::string::npos);
    CHECK(what.find("--objective") != std::string::npos);
    for (const std::string& word : words) {
      CHECK(what.find(word) != std::string::npos);
    }
  }
}

Series series(Metric metric, int rows, int n_steps, const std::vector<float>& values) {
  Series s;
  s.metric = metric;
  s.rows = rows;
  s.n_steps = n_steps;
  s.values = values;
  return s;
}

}  // namespace

TEST_CASE("an objective is a weighted sum of metrics, compensators and statistics") {
  const Objective o =
      Objective::parse("error_output+0.5*evicted_mass:p90+1e+1*error_corrected.moments:std+-2*retention:a-b:max");
  REQUIRE(o.terms.size() == 4);
  CHECK(o.terms[0].metric == Metric::error_output);
  CHECK(o.terms[0].weight == 1);
  CHECK(o.terms[0].statistic == Statistic::mean);
  CHECK(o.terms[1].metric == Metric::evicted_mass);
  CHECK(o.terms[1].weight == 0.5);
  CHECK(o.terms[1].statistic == Statistic::p90);
  CHECK(o.terms[2].compensator == "moments");
  CHECK(o.terms[2].weight == 10);
  CHECK(o.terms[2].statistic == Statistic::std);
  CHECK(o.terms[3].weight == -2);
  CHECK(o.terms[3].span == "a-b");
  CHECK(o.terms[3].statistic == Statistic::max);
  CHECK(o.bytes == 0);
  CHECK(o.compensators() == std::vector<std::string>{"moments"});
  CHECK(o.metrics().has(Metric::retention));
  CHECK(o.metrics().has(Metric::bytes));
  CHECK_FALSE(o.metrics().has(Metric::logit_spread));
  CHECK(o.needs_steps());
  CHECK_FALSE(Objective::parse("error_output").needs_steps());
  CHECK(Objective::parse("log_mass_ratio.mean").needs_steps());
  CHECK_FALSE(Objective::parse("projected_error").per_head());
  // A compensator is known by its canonical text, keys and all.
  const Objective c = Objective::parse("error_corrected.gaussian:strength=0.5,freeze=false:p99");
  CHECK(c.terms[0].compensator == "gaussian:freeze=false,strength=0.5");
  CHECK(c.terms[0].statistic == Statistic::p99);
  CHECK(Objective::parse("error_corrected.gaussian:strength=1").terms[0].compensator == "gaussian");
  CHECK(Objective::parse("error@bytes=64KiB+0.1*evicted_mass@bytes=64KiB").bytes == 65536);
}

TEST_CASE("an objective that cannot be is refused in a sentence that names what is near") {
  refuses("eror_output", {"'eror_output'", "'error_output'"});
  refuses("", {"empty term"});
  refuses("error+", {"empty term"});
  refuses("error:p9", {"'p9'", "'p90'"});
  refuses("x*error", {"'x'", "weight"});
  refuses("0*error", {"weight"});
  refuses("error_corrected", {"compensator", "error_corrected.moments"});
  refuses("error_corrected:p90", {"compensator"});
  refuses("error_corrected.none", {"'none'"});
  refuses("error.moments", {"'moments'", "without a compensator"});
  refuses("retention", {"span", "retention:NAME"});
  refuses("error@tokens=5", {"@bytes=SIZE"});
  refuses("error@bytes=some", {"'some'"});
  refuses("error@bytes=1KiB+error", {"some terms"});
  refuses("error@bytes=1KiB+evicted_mass@bytes=2KiB", {"different bytes"});
  try {
    Objective::parse("error_corrected.momnts");
    FAIL("was accepted");
  } catch (const ConfigError& e) {
    CHECK(std::string(e.what()).find("'moments'") != std::string::npos);
  }
}

TEST_CASE("a cell's sums are statistics per head, weighted by the steps that count") {
  // Four query heads in two KV heads, three steps; the second head counts two of them.
  CellResult cell;
  cell.series = {series(Metric::error_output, 4, 3, {1, 2, 3, kSkipped, 5, 7, 0, 0, 6, 1, 1, 1}),
                 series(Metric::bytes, 2, 3, {10, 20, 30, 1, 1, 1})};
  const Objective mean = Objective::parse("error_output");
  const std::vector<Sums> rows = mean.measure(cell, 4, 2);
  REQUIRE(rows.size() == 3);
  CHECK(mean.value(rows[0]) == Approx((1 + 2 + 3 + 5 + 7) / 5.0));
  CHECK(mean.value(rows[1]) == Approx((0 + 0 + 6 + 1 + 1 + 1) / 6.0));
  CHECK(std::isnan(mean.value(rows[2])));  // no metric of the whole layer
  CHECK(rows[0].bytes / rows[0].bytes_steps == Approx(20));
  const Objective both = Objective::parse("0.5*error_output+2*error_output:max");
  const std::vector<Sums> two = both.measure(cell, 4, 2);
  CHECK(both.value(two[0]) == Approx(0.5 * 18 / 5 + 2 * (3 * 3 + 2 * 7) / 5.0));
  Sums all;
  all.add(two[0]);
  all.add(two[1]);
  CHECK(both.value(all) == Approx(0.5 * 27 / 11 + 2 * (3 * 3 + 2 * 7 + 3 * 6 + 3 * 1) / 11.0));
}

TEST_CASE("at equal bytes a value lies between the budgets around them, linear in the logarithm") {
  const Objective o = Objective::parse("error_output@bytes=2000B");
  const auto at = [](double bytes, double value) {
    Sums s;
    s.weighted = {value * 4};
    s.n = {4};
    s.bytes = bytes * 3;
    s.bytes_steps = 3;
    return s;
  };
  const std::vector<Sums> budgets{at(4000, 0.1), at(1000, 0.5), at(16000, 0.05)};
  CHECK(o.value_at_bytes(budgets) == Approx(0.5 + 0.5 * (0.1 - 0.5)));  // 2000 is halfway from 1000 to 4000
  const std::vector<Sums> above{at(4000, 0.1), at(8000, 0.5)}, below{at(500, 0.1), at(1999, 0.5)};
  CHECK(std::isnan(o.value_at_bytes(above)));  // never extrapolated
  CHECK(std::isnan(o.value_at_bytes(below)));
  const std::vector<Sums> exact{at(2000, 0.3)};
  CHECK(o.value_at_bytes(exact) == Approx(0.3));
}
