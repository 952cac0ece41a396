// How the processes of a sweep share its units. This is the team of one; others override every call, each of which all
// members make in the same order.
#pragma once
#include <cstddef>
#include <optional>
#include <string>

namespace kvreplay {

// Another member failed, with this exit code, and says why.
struct TeamFailed {
  int code;
};

class Team {
 public:
  virtual ~Team() = default;
  virtual bool leads() const { return true; }  // one member: resolves the plan, finds the units, writes the tables
  virtual std::string agree(const std::string& text) { return text; }  // everyone gets what the leader gave
  // From now on next() hands out 0 ... n - 1.
  virtual void begin(std::size_t n) {
    next_ = 0;
    n_ = n;
  }
  // A unit that no other member has; nothing where all are taken.
  virtual std::optional<std::size_t> next() { return next_ < n_ ? std::optional(next_++) : std::nullopt; }
  virtual void wait() {}  // until every member is here
  // Whether it is so for any member; returns when every member is here.
  virtual bool any(bool mine) { return mine; }
  virtual void attend() {}  // now and then, while a unit is worked on
  // This member cannot go on: instead of coming back from their next common step the others throw TeamFailed. True for
  // the first that fails, who is to say why.
  virtual bool fail(int /*code*/) { return true; }
  virtual int n_here() const { return 1; }  // members on this machine

 private:
  std::size_t next_ = 0, n_ = 0;
};

}  // namespace kvreplay
