#include "sim/replay.hpp"

#include <algorithm>
#include <ctime>
#include <new>

#include "sim/checkpoints.hpp"
#include "sim/measure.hpp"
#include "sim/parallel.hpp"
#include "sim/set.hpp"

namespace kvreplay {
namespace {

// Of this thread alone: what a task costs does not depend on what else the machine does.
double seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// One job while its layer is replayed.
struct Running {
  const Job* job;
  std::vector<std::unique_ptr<Set>> sets;
  std::vector<Meter> meters;  // one per lane, in order of sets
  CellCompensators compensators;
  std::unique_ptr<Allocator> allocator;
  bool to_allocate = false;  // head budgets wait for the first cut or eviction
  std::unique_ptr<HeadErrors> errors;
  std::vector<double> seconds;  // per set
};

class Replay {
 public:
  Replay(const Layer& layer, std::span<const Job> jobs, const ReplayOptions& options)
      : layer_(layer),
        options_(options),
        shared_{.layer = layer},
        checkpoints_(layer, options.seed),
        full_attention_(layer, options.metrics) {
    shared_.exact.resize(std::size_t(layer.n_kv_heads));
    product_ = options.metrics.needs_evicted_output() ? ValueProduct::f64 : ValueProduct::f32;
    keep_logits_ = options.metrics.has(Metric::logit_spread) || options.metrics.has(Metric::logit_variance);
    result_.cells.resize(jobs.size());
    exact_seconds_.assign(std::size_t(layer.n_kv_heads), 0);
    prefill_seconds_ = exact_seconds_;
    for (const Job& job : jobs) {
      running_.push_back({.job = &job,
                          .sets = {},
                          .meters = {},
                          .compensators = {},
                          .allocator = nullptr,
                          .errors = nullptr,
                          .seconds = {}});
    }
  }

  LayerResult run() {
    look_ahead();
    shared_prefill();
    for (std::size_t j = 0; j < running_.size(); ++j) {
      guarded(j, [&] { make(j); });
    }
    parallel(int(running_.size()), options_.threads,
             [&](int j) { guarded(std::size_t(j), [&] { prefill(std::size_t(j)); }); });

    for (Pos begin = layer_.prompt_len; begin < layer_.n_tokens; begin += options_.block_steps) {
      if (options_.stop && options_.stop->load()) {
        result_.complete = false;
        break;
      }
      block(begin, std::min<int>(options_.block_steps, layer_.n_tokens - begin));
    }
    for (std::size_t j = 0; j < running_.size(); ++j) {
      guarded(j, [&] { finish(j); });
    }
    for (double s : prefill_seconds_) {
      result_.prefill_seconds += s;
    }
    for (double s : exact_seconds_) {
      result_.exact_seconds += s;
    }
    return std::move(result_);
  }

 private:
  // What went wrong, in a sentence; empty if nothing did. Parts may come from outside and throw anything.
  template <class Work>
  static std::string failure_of(Work work) {
    try {
      work();
      return {};
    } catch (const std::bad_alloc&) {
      return "out of memory; lower --memory or replay fewer methods at once";
    } catch (const std::exception& e) {
      return *e.what() != '\0' ? e.what() : "it failed and did not say why";
    } catch (...) {
      return "it failed with something that is no std::exception";
    }
  }

  // A cell that failed is left alone from then on, and the others never notice. One task per cell at a time.
  template <class Work>
  void guarded(std::size_t j, Work work) {
    std::string& error = result_.cells[j].error;
    if (error.empty()) {
      error = failure_of(work);
    }
  }

  // What oracles see of later steps.
  void look_ahead() {
    bool attention = false, outputs = false;
    for (const Running& r : running_) {
      const Needs needs = r.job->method->needs();
      attention |= needs.future_attention;
      outputs |= needs.future_outputs;
    }
    if (attention) {
      shared_.future.resize(std::size_t(layer_.n_kv_heads));
    }
    if (outputs) {
      shared_.full.resize(std::size_t(layer_.n_kv_heads));
    }
    parallel(layer_.n_kv_heads, options_.threads, [&](int h) {
      if (attention) {
        shared_.future[std::size_t(h)] = column_mass(layer_, h, layer_.prompt_len, layer_.n_tokens);
      }
      if (!outputs) {
        return;
      }
      MatD& full = shared_.full[std::size_t(h)];
      full.resize(Eigen::Index(layer_.n_steps()) * layer_.group_size, layer_.v_head_dim);
      ExactBlock e;
      for (Pos begin = layer_.prompt_len; begin < layer_.n_tokens; begin += options_.block_steps) {
        e.compute(layer_, h, begin, std::min<int>(options_.block_steps, layer_.n_tokens - begin), ValueProduct::f64,
                  false);
        full.middleRows(Eigen::Index(begin - layer_.prompt_len) * layer_.group_size, e.rows) =
            e.num.array().colwise() / e.z;
      }
    });
  }

  // The last prompt token's attention, and the prompt's column masses, for all methods.
  void shared_prefill() {
    std::vector<int> windows;  // of the selectors; what else asks for queries looks at them itself
    const auto announce = [&](const PartUse& selector) {
      const int w = shared_.n_votes(selector.info->needs(selector.config(layer_.index).get()).prompt_queries);
      if (w != 0 && std::find(windows.begin(), windows.end(), w) == windows.end()) {
        windows.push_back(w);
      }
    };
    for (const Running& r : running_) {
      const Method& m = *r.job->method;
      if (m.traits.pool == Pool::all) {
        announce(m.select);
      }
      if (m.prefill_select) {
        announce(*m.prefill_select);
      }
    }
    for (int w : windows) {
      for (int h = 0; h < layer_.n_kv_heads; ++h) {
        shared_.mass[{h, w}];
      }
    }
    const Pos last = layer_.prompt_len - 1;
    parallel(layer_.n_kv_heads, options_.threads, [&](int h) {
      const double start = seconds();
      ExactBlock& e = shared_.exact[std::size_t(h)];
      if (layer_.first_query <= last) {
        e.compute(layer_, h, last, 1, ValueProduct::none, false);
      } else {
        e.blank(layer_, last, 1);
      }
      for (int w : windows) {
        shared_.mass.at({h, w}) = column_mass(layer_, h, layer_.prompt_len - w, layer_.prompt_len);
      }
      prefill_seconds_[std::size_t(h)] += seconds() - start;
    });
  }

  // Compensators of a cell: those measured beside every method, and the method's own.
  void choose_compensators(std::size_t j) {
    const Method& m = *running_[j].job->method;
    CellCompensators& c = running_[j].compensators;
    c.parts = options_.compensators;
    std::vector<std::string>& names = result_.cells[j].compensators;
    for (const PartUse* part : c.parts) {
      names.push_back(canonical(*part));
    }
    if (m.compensate) {
      const auto it = std::find(names.begin(), names.end(), canonical(*m.compensate));
      c.acting = int(it - names.begin());
      if (it == names.end()) {
        names.push_back(canonical(*m.compensate));
        c.parts.push_back(&*m.compensate);
      }
    }
    result_.cells[j].acting = c.acting;
  }

  void make(std::size_t j) {
    Running& r = running_[j];
    const Method& m = *r.job->method;
    CellResult& cell = result_.cells[j];
    choose_compensators(j);
    if (!r.compensators.parts.empty() && layer_.logit_softcap > 0) {
      throw ConfigError(
          "compensators in closed form do not hold under a logit soft-cap, which this model has; use "
          "--compensators none");
    }
    if (m.allocate) {
      r.allocator = make_allocator(*m.allocate);
      r.to_allocate = r.allocator->over_sets() && r.job->head_budgets.empty();
    }
    const SetPlan plan{.select = &m.select,
                       .read = m.read ? &*m.read : nullptr,
                       .rewrite = m.rewrite ? &*m.rewrite : nullptr,
                       .allocate = r.allocator.get(),
                       .traits = m.traits,
                       .budget = r.job->budget,
                       .seed = options_.seed,
                       .evicted_at = r.job->evicted_at};
    r.sets = make_sets(plan, r.job->head_budgets);
    r.seconds.assign(r.sets.size(), 0);
    add_series(cell, layer_, options_, m.traits.scope == Scope::query_head ? layer_.n_heads : layer_.n_kv_heads);
    keep_room(cell, m);
    for (const auto& set : r.sets) {
      for (int lane = 0; lane < set->n_lanes; ++lane) {
        r.meters.emplace_back(layer_, options_, r.compensators, cell, checkpoints_, full_attention_, *set, lane);
      }
    }
    if (layer_.w_o.size() > 0 && options_.metrics.projected()) {
      r.errors = std::make_unique<HeadErrors>();
      r.errors->corrected.resize(r.compensators.parts.size());
    }
  }

  std::unique_ptr<Allocator> make_allocator(const PartUse& use) const {
    return use.info->allocate(use.config(layer_.index).get());
  }

  std::vector<std::unique_ptr<Set>> make_sets(const SetPlan& plan, const std::vector<int>& head_budgets) {
    std::vector<std::unique_ptr<Set>> sets;
    for (int i = 0; i < Set::count(layer_, plan.traits.scope); ++i) {
      Set& set = *sets.emplace_back(std::make_unique<Set>(shared_, plan, i));
      if (!head_budgets.empty()) {
        set.budget = std::max(1, head_budgets[std::size_t(set.lanes[0].kv_head)]);
      }
    }
    return sets;
  }

  // Room for what is kept beyond the series.
  void keep_room(CellResult& cell, const Method& m) const {
    const auto n_heads = std::size_t(layer_.n_heads);
    if (!options_.output_steps.empty()) {
      const std::vector<float> none(n_heads * options_.output_steps.size() * std::size_t(layer_.v_head_dim), kSkipped);
      cell.outputs = {none, none, none, std::vector<std::vector<float>>(cell.compensators.size(), none)};
    }
    if (options_.keep_attended && m.read) {
      cell.attended.assign(n_heads * std::size_t(layer_.n_steps()) * ((std::size_t(layer_.n_tokens) + 7) / 8), 0);
    }
  }

  void allocate(Running& r, const std::vector<std::vector<float>>& scores) {
    if (!r.to_allocate || scores[0].empty()) {
      return;
    }
    assign(*r.allocator, scores, r.job->budget, r.sets);
    r.to_allocate = false;
  }

  static void assign(const Allocator& allocator, const std::vector<std::vector<float>>& scores, int mean_budget,
                     std::span<const std::unique_ptr<Set>> sets) {
    const std::vector<int> budgets = allocator.assign(scores, mean_budget);
    for (std::size_t i = 0; i < sets.size(); ++i) {
      sets[i]->budget = std::max(1, budgets[i]);
    }
  }

  // Tokens per set that the selector before the "/" keeps, mean over the layer.
  int prompt_budget(const Job& job) const {
    const Budget& own = job.method->prefill_budget;
    if (job.prompt_budget > 0 || own.unit == Budget::Unit::none) {
      return job.prompt_budget > 0 ? job.prompt_budget : job.budget;
    }
    const int sets_per_kv_head = job.method->prefill_traits.scope == Scope::query_head ? layer_.group_size : 1;
    return own.tokens(layer_.prompt_len, layer_.slot_bytes(), {}, sets_per_kv_head);
  }

  void cut_prompt(Running& r) {
    const Method& m = *r.job->method;
    const std::vector<int>& head_budgets = r.job->prompt_head_budgets;
    const auto allocator = m.prefill_allocate ? make_allocator(*m.prefill_allocate) : nullptr;
    const SetPlan plan{.select = &*m.prefill_select,
                       .allocate = allocator.get(),
                       .traits = m.prefill_traits,
                       .budget = prompt_budget(*r.job),
                       .seed = options_.seed};
    const auto cuts = make_sets(plan, head_budgets);
    std::vector<std::vector<float>> scores(cuts.size());
    for (std::size_t i = 0; i < cuts.size(); ++i) {
      cuts[i]->prefill_scores(scores[i]);
    }
    if (allocator && allocator->over_sets() && head_budgets.empty() && !scores[0].empty()) {
      assign(*allocator, scores, plan.budget, cuts);
    }
    for (std::size_t i = 0; i < cuts.size(); ++i) {
      Set& cut = *cuts[i];
      cut.prefill_evict(scores[i]);
      const std::vector<Pos> kept(cut.positions().begin(), cut.positions().end());
      for (const auto& set : r.sets) {
        for (int lane = 0; lane < set->n_lanes; ++lane) {
          const Lane& to = set->lanes[std::size_t(lane)];
          for (const Lane& from : cut.lanes) {
            const bool same_head = from.kv_head == to.kv_head &&
                                   (m.prefill_traits.scope != Scope::query_head || from.first_head == to.first_head);
            if (same_head) {
              set->pin(lane, kept);
            }
          }
        }
      }
    }
  }

  void prefill(std::size_t j) {
    Running& r = running_[j];
    const double start = seconds();
    if (r.job->method->prefill_select) {
      cut_prompt(r);
    }
    std::vector<std::vector<float>> scores(r.sets.size());
    for (std::size_t i = 0; i < r.sets.size(); ++i) {
      r.sets[i]->prefill_scores(scores[i]);
    }
    allocate(r, scores);
    for (std::size_t i = 0; i < r.sets.size(); ++i) {
      r.sets[i]->prefill_evict(scores[i]);
    }
    r.seconds[0] += seconds() - start;
  }

  void block(Pos begin, int steps) {
    parallel(layer_.n_kv_heads, options_.threads, [&](int h) {
      const double start = seconds();
      ExactBlock& e = shared_.exact[std::size_t(h)];
      e.compute(layer_, h, begin, steps, product_, keep_logits_);
      if (full_attention_.asked()) {
        full_attention_.block(h, e);
      }
      exact_seconds_[std::size_t(h)] += seconds() - start;
      if (!shared_.future.empty()) {
        e.add_column_mass(shared_.future[std::size_t(h)], -1);
      }
    });

    // A task is one set; a job whose sets still wait for one another to be allocated is one task.
    struct Task {
      std::size_t job;
      int set;  // -1: all of them together
    };
    std::vector<Task> tasks;
    for (std::size_t j = 0; j < running_.size(); ++j) {
      Running& r = running_[j];
      if (!result_.cells[j].error.empty()) {
        continue;
      }
      if (r.errors) {
        begin_errors(*r.errors, steps);
      }
      if (r.to_allocate) {
        tasks.push_back({j, -1});
      } else {
        for (int i = 0; i < int(r.sets.size()); ++i) {
          tasks.push_back({j, i});
        }
      }
    }
    std::vector<std::string> errors(tasks.size());  // one for each task, so that the same set speaks on any thread
    parallel(int(tasks.size()), options_.threads, [&](int t) {
      const std::size_t j = tasks[std::size_t(t)].job;
      const int i = tasks[std::size_t(t)].set;
      errors[std::size_t(t)] = failure_of(
          [&] { i < 0 ? step_together(running_[j], steps) : step_alone(running_[j], std::size_t(i), steps); });
    });
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      std::string& error = result_.cells[tasks[t].job].error;
      if (error.empty()) {
        error = std::move(errors[t]);
      }
    }
    if (layer_.w_o.size() > 0) {
      parallel(int(running_.size()), options_.threads,
               [&](int j) { guarded(std::size_t(j), [&] { project(std::size_t(j), begin, steps); }); });
    }
    if (options_.progress) {
      options_.progress(begin + steps - layer_.prompt_len);
    }
  }

  void step_alone(Running& r, std::size_t i, int steps) {
    const double start = seconds();
    Set& set = *r.sets[i];
    set.begin_block(steps);
    std::vector<float> scores;
    const auto evict = [&] {
      set.evict_scores(scores);
      set.evict(scores);
    };
    for (int s = 0; s < steps; ++s) {
      set.arrive(s);
      if (set.evicts_before()) {
        evict();
      }
      set.attend();
      if (!set.evicts_before()) {
        evict();
      }
      set.finish();
    }
    measure(r, i);
    r.seconds[i] += seconds() - start;
  }

  void step_together(Running& r, int steps) {
    const double start = seconds();
    std::vector<std::vector<float>> scores(r.sets.size());
    const auto evict = [&] {
      for (std::size_t i = 0; i < r.sets.size(); ++i) {
        r.sets[i]->evict_scores(scores[i]);
      }
      allocate(r, scores);
      for (std::size_t i = 0; i < r.sets.size(); ++i) {
        r.sets[i]->evict(scores[i]);
      }
    };
    const bool before = r.sets[0]->evicts_before();
    for (auto& set : r.sets) {
      set->begin_block(steps);
    }
    for (int s = 0; s < steps; ++s) {
      for (auto& set : r.sets) {
        set->arrive(s);
      }
      if (before) {
        evict();
      }
      for (auto& set : r.sets) {
        set->attend();
      }
      if (!before) {
        evict();
      }
      for (auto& set : r.sets) {
        set->finish();
      }
    }
    for (std::size_t i = 0; i < r.sets.size(); ++i) {
      measure(r, i);
    }
    r.seconds[0] += seconds() - start;
  }

  void measure(Running& r, std::size_t i) {
    Set& set = *r.sets[i];
    for (int lane = 0; lane < set.n_lanes; ++lane) {
      r.meters[i * std::size_t(set.n_lanes) + std::size_t(lane)].block(set, set.lanes[std::size_t(lane)],
                                                                       r.errors.get());
    }
  }

  void begin_errors(HeadErrors& e, int steps) const {
    const Eigen::Index width = Eigen::Index(layer_.n_heads) * layer_.v_head_dim;
    for (MatF* m : {&e.full, &e.plain, &e.output}) {
      m->setZero(steps, width);
    }
    for (MatF& m : e.corrected) {
      m.setZero(steps, width);
    }
  }

  // Errors after the output projection, heads summed: |W_o (f - f_M)| / |W_o f|.
  void project(std::size_t j, Pos begin, int steps) {
    Running& r = running_[j];
    if (!r.errors) {
      return;
    }
    const MatF full = r.errors->full * layer_.w_o.transpose();  // (steps, hidden)
    const auto put = [&](Metric metric, int compensator, const MatF& difference) {
      for (Series& s : result_.cells[j].series) {
        if (s.metric != metric || s.compensator != compensator) {
          continue;
        }
        const MatF projected = difference * layer_.w_o.transpose();
        for (int i = 0; i < steps; ++i) {
          const double norm = full.row(i).cast<double>().norm();
          const double error = projected.row(i).cast<double>().norm();
          if (norm > 0) {
            s.at(0, begin - layer_.prompt_len + i) = float(error / norm);
          }  // NaN stays NaN
        }
      }
    };
    put(Metric::projected_error, -1, r.errors->plain);
    put(Metric::projected_error_output, -1, r.errors->output);
    for (std::size_t c = 0; c < r.errors->corrected.size(); ++c) {
      put(Metric::projected_error_corrected, int(c), r.errors->corrected[c]);
    }
  }

  void finish(std::size_t j) {
    Running& r = running_[j];
    CellResult& cell = result_.cells[j];
    if (r.job->method->traits.scope == Scope::query_head) {
      fold_query_heads(cell, layer_);
    }
    for (std::size_t c = 0; c < cell.compensators.size(); ++c) {
      double sum = 0;
      for (const Meter& meter : r.meters) {
        sum += meter.state_bytes(c);
      }
      cell.state_bytes.push_back(sum / layer_.n_kv_heads);
    }
    const bool per_lane = r.job->method->prefill_select.has_value();  // lanes of one set keep different prompts
    for (const auto& set : r.sets) {
      for (int lane = 0; lane < (per_lane ? set->n_lanes : 1); ++lane) {
        auto& row = cell.evicted_at.emplace_back(std::size_t(layer_.n_tokens), layer_.n_steps());
        for (const Eviction& e : set->lanes[std::size_t(lane)].evicted) {
          row[std::size_t(e.token)] = e.missing_from - layer_.prompt_len;
        }
      }
    }
    for (double s : r.seconds) {
      cell.seconds += s;
    }
  }

  const Layer& layer_;
  const ReplayOptions& options_;
  Shared shared_;
  Checkpoints checkpoints_;
  FullAttention full_attention_;
  ValueProduct product_;
  bool keep_logits_;
  std::vector<Running> running_;
  LayerResult result_;
  std::vector<double> exact_seconds_, prefill_seconds_;  // per KV head
};

}  // namespace

LayerResult replay(const Layer& layer, std::span<const Job> jobs, const ReplayOptions& options) {
  return Replay(layer, jobs, options).run();
}

}  // namespace kvreplay
