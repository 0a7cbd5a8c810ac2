// What the rivals' PEs share behind their lanes, as careful with energy as the group PE studied
// beside them: a narrow accumulator of full-adder cells, whose sum is registered at a step's end and
// joins the partial sum a cycle later on an adder that is still otherwise.
module late_sum #(
    parameter SUM = 20,
    parameter PSUM = 28,
    parameter UP = 0          // 1: what is accumulated moves up a bit before each addition
) (
    input                  clock,
    input                  reset,
    input  [SUM-1:0]       a,        // a + b + carry_in is added
    input  [SUM-1:0]       b,
    input  [1:0]           carry_in,
    input                  last_in,  // of a step
    input  [PSUM-1:0]      psum_in,  // sampled a cycle after `last_in`
    output reg [PSUM-1:0]  psum      // valid two cycles after it
);
    reg  [SUM-1:0]  total, held;
    reg             take;
    wire [SUM-1:0]  base = UP ? {total[SUM-2:0], 1'b0} : total;
    wire [SUM-1:0]  sum, carry;
    wire [SUM:0]    next;
    wire [PSUM-1:0] next_psum;

    carry_save #(.WIDTH(SUM)) three (
        .a(a), .b(b), .c(base), .low(carry_in[0]), .sum(sum), .carry(carry)
    );
    ripple_adder #(.WIDTH(SUM + 1)) narrow (
        .a({sum, carry_in[1]}), .b({carry, carry_in[1]}), .sum(next)
    );
    ripple_adder #(.WIDTH(PSUM)) wide (
        .a(psum_in), .b({{(PSUM-SUM){held[SUM-1]}}, held}), .sum(next_psum)
    );

    always @(posedge clock) begin
        total <= reset | last_in ? {SUM{1'b0}} : next[SUM:1];
        if (last_in) held <= next[SUM:1];
        take <= last_in & ~reset;
        if (take) psum <= next_psum;
    end
endmodule
