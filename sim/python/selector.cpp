// A selector whose opinion is Python's. The lock is taken for each call of it, and for nothing else.
#include <fmt/format.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "policies/errors.hpp"
#include "sim/python/active_run.hpp"
#include "sim/python/bindings.hpp"
#include "sim/python/definition.hpp"
#include "sim/python/view.hpp"

namespace kvreplay::python {
namespace {

constexpr int kBatchSteps = 64;  // rows that steps() gets at most: what waits for it stays small

// A value as the class gets it.
py::object as_python(const ParamInfo& param, const ParamValue& value, int budget) {
  switch (param.type) {
    case ParamType::integer:
      return py::int_(static_cast<long long>(value.number));
    case ParamType::boolean:
      return py::bool_(value.number != 0);
    case ParamType::tokens:
      return py::int_(Tokens{value.number, value.percent}.of(budget));
    case ParamType::choice:
      return py::str(std::string(param.choices[static_cast<std::size_t>(value.number)]));
    default:
      return py::float_(value.number);
  }
}

class PythonSelector final : public Selector {
 public:
  PythonSelector(const Config& config, const SetShape& shape) : of_(config.of) {
    py::gil_scoped_acquire gil;
    auto view = std::make_unique<LentView>(of_->prompt_queries);
    lent_ = view.get();
    view_.object = py::cast(std::move(view));
    py::dict keys;
    for (std::size_t i = 0; i < of_->params.size(); ++i) {
      keys[py::str(std::string(of_->params[i].name))] = as_python(of_->params[i], config.values[i], shape.budget);
    }
    self_.object = guarded([&] { return of_->type.object(shape, **keys); });
  }

  void prefill(const View& view) override {
    if (of_->prefill) {
      py::gil_scoped_acquire gil;
      call(view, "prefill");
    }
  }

  void observe(const View& view) override {
    if (of_->steps) {
      batch(view);
    } else if (of_->step) {
      py::gil_scoped_acquire gil;
      call(view, "step");
    }
  }

  void score(const View& view, std::span<float> out) override {
    py::gil_scoped_acquire gil;
    flush(view);
    const py::object scores = call(view, "score");
    const auto array = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(scores);
    if (!array) {
      refuse(fmt::format("'{}'", py::str(py::type::of(scores).attr("__name__")).cast<std::string>()), out.size());
    }
    if (array.ndim() != 1 || array.size() != std::ssize(out)) {
      refuse("shape " + py::str(array.attr("shape")).cast<std::string>(), out.size());
    }
    std::copy_n(array.data(), out.size(), out.begin());
  }

  void evicted(const View& view, std::span<const int> slots) override {
    if (of_->evicted) {
      py::gil_scoped_acquire gil;
      call(view, "evicted", copy_of(slots));
    }
  }

 private:
  // Runs the user's code; its exception goes on as one sentence, and the exception itself to the run.
  template <class Call>
  static py::object guarded(Call call) {
    ActiveRun* run = ActiveRun::get();
    KVREPLAY_CHECK(run != nullptr);
    if (run->stop) {
      throw std::runtime_error("the run was stopped");
    }
    try {
      return call();
    } catch (py::error_already_set& e) {
      throw std::runtime_error(run->keep(e));
    }
  }

  // Lends the view to a method for one call.
  template <class... Arguments>
  py::object call(const View& view, const char* method, const Arguments&... arguments) {
    lent_->lend(&view);
    struct GiveBack {
      LentView* lent;
      ~GiveBack() { lent->lend(nullptr); }
    } give_back{lent_};
    return guarded([&] { return self_.object.attr(method)(view_.object, arguments...); });
  }

  [[noreturn]] void refuse(const std::string& got, std::size_t n_slots) const {
    throw std::runtime_error(
        fmt::format("score returned {}, expected an array of shape ({},), one number for each slot", got, n_slots));
  }

  // Keeps this step's attention for steps().
  void batch(const View& view) {
    const std::size_t begin = attention_.size();
    attention_.resize(begin + view.pos.size());
    view.attention(std::span(attention_).subspan(begin));
    now_.push_back(view.now);
    if (now_.size() == kBatchSteps) {
      py::gil_scoped_acquire gil;
      flush(view);
    }
  }

  void flush(const View& view) {
    if (now_.empty()) {
      return;
    }
    // Nothing left since the first of these steps, so every row is the beginning of the next.
    const std::size_t n_steps = now_.size(), n_slots = view.pos.size();
    auto attention = empty_array<float>({std::ssize(now_), std::ssize(view.pos)});
    const std::span<float> out = span_of(attention);
    std::fill(out.begin(), out.end(), 0.0F);
    auto from = attention_.begin();
    for (std::size_t i = 0; i < n_steps; ++i) {
      const std::ptrdiff_t n = std::ptrdiff_t(n_slots - (n_steps - 1 - i));
      std::copy(from, from + n, out.begin() + std::ptrdiff_t(i * n_slots));
      from += n;
    }
    const py::array_t<Pos> now = copy_of<Pos>(now_), pos = copy_of<Pos>(view.pos);
    attention_.clear();
    now_.clear();
    guarded([&] { return self_.object.attr("steps")(attention, pos, now); });
  }

  std::shared_ptr<const Definition> of_;
  Guest self_, view_;
  LentView* lent_ = nullptr;      // what view_ holds
  std::vector<float> attention_;  // of the steps since the last call of steps(), (n_slots) each, which grows by one
  std::vector<Pos> now_;          // of these steps
};

}  // namespace

std::unique_ptr<Selector> make_selector(const Config& config, const SetShape& shape) {
  return std::make_unique<PythonSelector>(config, shape);
}

}  // namespace kvreplay::python
